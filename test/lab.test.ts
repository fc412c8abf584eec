/**
 * Runs docs/lab.md: each experiment in a folder and on ports of its own, each command in the order in which it stands
 * there, and compares what comes with what the page says. docs/lab.zh-CN.md must have the same blocks.
 *
 * In a block, `1$` is the prompt of terminal 1, and what follows is what the command prints. A line `^C` means that the
 * command runs until it is interrupted: when its terminal gets the next command, and after those that were started later.
 * `…` stands for any text, and as a line for any lines. `echo $?` prints the exit code.
 * LAB=write writes what comes into both pages instead, where it differs; blocks with a `…` are left to the writer.
 */
import { afterAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { cpSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { mortal, ROOT, temporaryFolder } from "./harness.ts";

setDefaultTimeout(60_000);

const PAGES = ["docs/lab.md", "docs/lab.zh-CN.md"] as const;
const read = (page: string) => readFileSync(join(ROOT, page), "utf8");
const BLOCK = /^```console\n((?:\d\$ ).*?)^```$/gms;
const MARK = "^C";

interface Command {
  readonly terminal: string;
  readonly text: string;
  readonly isInterrupted: boolean;
  readonly expected: string;
}

/** The commands of a block, each with the lines that follow it. */
function parseBlock(block: string): Command[] {
  return block
    .split(/^(?=\d\$ )/m)
    .filter((part) => part.trim() !== "")
    .map((part) => {
      const [prompt = "", ...lines] = part.split("\n");
      const isInterrupted = lines.includes(MARK);
      const expected = lines.filter((line) => line !== MARK).join("\n");
      return { terminal: prompt.slice(0, 1), text: prompt.slice(3), isInterrupted, expected };
    });
}

/** The experiments of a page: each section that has commands. */
const experiments = read(PAGES[0])
  .split(/^(?=## )/m)
  .map((section) => ({
    title: /^## (.*)$/m.exec(section)?.[1] ?? "",
    commands: [...section.matchAll(BLOCK)].flatMap(([, block = ""]) => parseBlock(block)),
  }))
  .filter(({ commands }) => commands.length > 0);

/** Waits until it is so. @throws Error after 20 s */
async function until(isSo: () => boolean): Promise<void> {
  for (const began = performance.now(); !isSo(); await Bun.sleep(10))
    if (performance.now() - began > 20_000) throw new Error(`never: ${isSo}`);
}

/** The ports on which somebody listens. */
function listeningPorts(): Set<number> {
  const rows = ["tcp", "tcp6"].flatMap((table) => readFileSync(`/proc/net/${table}`, "latin1").split("\n").slice(1));
  const listening = rows.map((row) => row.trim().split(/\s+/)).filter((columns) => columns[3] === "0A");
  return new Set(listening.map((columns) => parseInt(columns[1]?.split(":")[1] ?? "", 16)));
}

const taken = new Set<number>();
/** A port of four digits, as those of the page have, which the kernel gives to no outgoing connection. */
function choosePort(): number {
  const inUse = listeningPorts();
  for (;;) {
    const port = 2000 + Math.floor(Math.random() * 6000);
    if (inUse.has(port) || taken.has(port)) continue;
    taken.add(port);
    return port;
  }
}

/** A command that has been started. */
class Running {
  /** What it has printed so far. */
  printed = "";
  /** Settles when it has ended and all that it printed is here. */
  readonly ended: Promise<number>;

  private constructor(
    readonly command: Command,
    readonly child: Bun.Subprocess<"ignore", "pipe", "ignore">,
  ) {
    this.ended = this.collect();
  }

  private async collect(): Promise<number> {
    const decoder = new TextDecoder();
    for await (const bytes of this.child.stdout) this.printed += decoder.decode(bytes, { stream: true });
    return this.child.exited;
  }

  static start(command: Command, text: string, cwd: string, port: number): Running {
    const { HOST: _host, NO_COLOR: _color, ...env } = process.env;
    const bun = `${join(process.execPath, "..")}:${env["PATH"]}`;
    const options = { cwd, env: { ...env, PATH: bun, PORT: String(port), NO_COLOR: "1" }, stdin: "ignore" } as const;
    const argv = mortal(["bash", "-c", `exec ${text} 2>&1`]);
    return new Running(command, Bun.spawn(argv, { ...options, stdout: "pipe", stderr: "ignore" }));
  }

  get isOver(): boolean {
    return this.child.exitCode !== null || this.child.signalCode !== null;
  }
}

/** One experiment: its folder, its ports, and what runs in its terminals. */
class Lab {
  private readonly ports = new Map(["8888", "8889", "8890"].map((port) => [port, String(choosePort())]));
  private readonly running: Running[] = [];
  private exitCode: number | null = 0;

  constructor(private readonly folder: string) {
    for (const path of ["server.ts", "client.ts", "client-robust.ts", "LICENSE", "docs/lab"])
      cpSync(join(ROOT, path), join(folder, path), { recursive: true });
    mkdirSync(join(folder, "shared"));
  }

  /** The command with this experiment's ports, also where it relies on the default. */
  private withPorts(text: string): string {
    const port = this.ports.get("8888");
    let command = text.replace(/\b888[89]\b|\b8890\b/g, (known) => this.ports.get(known) ?? known);
    if (/^bun client\.ts$/.test(command)) command += ` localhost ${port}`;
    if (/^bun client-robust\.ts/.test(command) && !command.includes("://")) command += ` http://localhost:${port}/data`;
    return command;
  }

  /** What has come, with the page's ports and folder instead of ours. */
  private shown(text: string): string {
    let shown = text.replaceAll("\r\n", "\n").replaceAll(`${this.folder}/`, "");
    for (const [known, port] of this.ports) shown = shown.replace(new RegExp(`\\b${port}\\b`, "g"), known);
    return shown;
  }

  /** Runs a command to its end; one that is interrupted, until it listens or has printed what is expected. */
  async run(command: Command): Promise<string> {
    if (command.text === "echo $?") return `${this.exitCode}\n`;
    const busy = this.running.findIndex(({ command: { terminal } }) => terminal === command.terminal);
    if (busy >= 0) await this.interrupt(this.running.slice(busy));
    const text = this.withPorts(command.text);
    const named = text.split(" ").find((word) => [...this.ports.values()].includes(word));
    const port = Number(named ?? this.ports.get("8888"));
    const running = Running.start(command, text, this.folder, Number(this.ports.get("8888")));
    this.running.push(running);
    if (command.isInterrupted) {
      const firstLine = new RegExp(escape(command.expected.split("\n")[0] ?? "", true));
      if (/server\.ts|sketch-plain|listen|badnet/.test(text))
        await until(() => running.isOver || listeningPorts().has(port));
      else if (!isWriting) await until(() => running.isOver || firstLine.test(normalised(running.printed)));
      else await Bun.sleep(1000);
      if (running.isOver) throw new Error(`${text} has ended: ${running.printed}`);
      return "";
    }
    const limit = setTimeout(() => running.child.kill("SIGKILL"), 30_000);
    this.exitCode = await running.ended;
    clearTimeout(limit);
    this.running.splice(this.running.indexOf(running), 1);
    return this.shown(running.printed);
  }

  readonly interrupted: { command: Command; printed: string }[] = [];

  /** Presses Ctrl-C, last things first, once everything that is expected has come. */
  async interrupt(running = [...this.running]): Promise<void> {
    for (const one of running.reverse()) {
      this.running.splice(this.running.indexOf(one), 1);
      const { command, child } = one;
      // What hangs must hang for a while.
      await Bun.sleep(isWriting ? 1500 : 300);
      const isComplete = () => matches(command.expected, this.shown(one.printed));
      const deadline = performance.now() + 10_000;
      if (!isWriting) await until(() => one.isOver || isComplete() || performance.now() > deadline);
      expect(one.isOver, `${command.text} must run until it is interrupted`).toBeFalse();
      child.kill("SIGINT");
      await one.ended;
      this.interrupted.push({ command, printed: this.shown(one.printed) });
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const { child } of this.running) {
      child.kill("SIGKILL");
      await child.exited;
    }
  }
}

const isWriting = process.env["LAB"] === "write";
const written = new Map<Command, string>();

const TIME = /\d+(?:\.\d+)? (ms|s)\b/g;

/** What two runs may have different: times (compared apart), dates, addresses, random names, and how much a kernel's buffers take. */
const normalised = (text: string) =>
  text
    .replace(/\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT/g, "DATE")
    .replace(/\.[0-9a-f]{12}\.part/g, ".RANDOM.part")
    .replace(/\b(\d+) of (\d+) B\b/g, (_, some, all) => (some === all ? `${all} of ${all} B` : `SOME of ${all} B`))
    .replace(/\b\d{7,}\b(?= (?:of|bytes))/g, (bytes) => `${Math.round(Number(bytes) / 10_000)}0000`)
    .replace(/\[::1\]|::1\b|127\.0\.0\.1/g, "ADDRESS")
    .replace(TIME, "TIME")
    .replace(/ +/g, " ")
    .replace(/[ \n]*$/, "\n");

/** The text as a pattern: a line `…` stands for any lines. */
const escape = (text: string, isOpen = false) =>
  `^ ?${normalised(text)
    .replace(/\n$/, "")
    .replace(/[.*+?^${}()|[\]\\]/g, "\\$&")
    .replace(/^…(?:\n|$)/gm, "(?:.*\\n)*?")
    .replaceAll("…", ".*")}${isOpen ? "" : "\\n?$"}`;

const matches = (expected: string, actual: string) => new RegExp(escape(expected)).test(normalised(actual));

/** Compares what has come with the page: the text, and the times as "at least". */
function compare({ text, expected }: Command, actual: string): void {
  if (!matches(expected, actual)) expect(normalised(actual), text).toBe(normalised(expected));
  const times = (printed: string) =>
    [...printed.matchAll(TIME)].map(([time, unit]) => parseFloat(time) * (unit === "s" ? 1000 : 1));
  // Random waits, and the first lines of a connection, have nothing to compare.
  const [told, seen] = [times(expected), times(actual)];
  if (told.length === seen.length && !expected.includes("Retry in"))
    for (const [i, ms] of told.entries())
      if (ms >= 1000) expect(seen[i], `${text}: ${ms} ms`).toBeGreaterThanOrEqual(Math.floor(ms / 1000) * 990);
}

if (process.platform === "linux")
  describe("docs/lab.md", () => {
    test.concurrent.each(experiments)("$title", async ({ commands }) => {
      await using folder = await temporaryFolder();
      await using lab = new Lab(folder.path);
      for (const command of commands) {
        const printed = await lab.run(command);
        if (isWriting) written.set(command, printed);
        else if (!command.isInterrupted) compare(command, printed);
      }
      await lab.interrupt();
      for (const { command, printed } of lab.interrupted)
        if (isWriting) written.set(command, printed);
        else compare(command, printed);
    });
  });

test("docs/lab.zh-CN.md has the blocks of docs/lab.md, in the same order", () => {
  const [english, chinese] = PAGES.map((page) => [...(read(page).match(/^```.*?^```$/gms) ?? [])]);
  expect(english?.length).toBeGreaterThan(20);
  expect(chinese).toEqual(english ?? []);
});

test("the listings in docs/lab.md are the sketches that it runs", () => {
  const listings = [...read(PAGES[0]).matchAll(/^```ts\n(.*?)^```$/gms)].map(([, listing = ""]) => listing);
  const sketches = ["server", "client", "client-loop"].map((name) => read(`docs/lab/sketch-${name}.ts`));
  expect(listings).toEqual(sketches.map((text) => text.slice(text.indexOf("\n\n") + 2)));
});

if (isWriting)
  afterAll(() => {
    const all = experiments.flatMap(({ commands }) => commands);
    for (const page of PAGES) {
      let index = 0;
      const text = read(page).replace(BLOCK, (_, body: string) => {
        const lines = parseBlock(body).flatMap(({ terminal, text, isInterrupted, expected }) => {
          const command = all[index++];
          const printed = (command && written.get(command)) ?? expected; // that experiment has not run
          const keeps = /(^|[^"])…/m.test(expected) || matches(expected, printed);
          if (!matches(expected, printed)) console.log(`── ${text}\n${printed}`);
          const shown = (keeps ? expected : printed).trimEnd();
          return [`${terminal}$ ${text}`, ...(shown === "" ? [] : [shown]), ...(isInterrupted ? [MARK] : [])];
        });
        return ["```console", ...lines, "```"].join("\n");
      });
      writeFileSync(join(ROOT, page), text);
    }
  });
