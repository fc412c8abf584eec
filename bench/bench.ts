/**
 * Measures the programs beside their peers, in one run.
 *
 *     bun run bench                  # server, client and files: some 8 minutes
 *     bun run bench files            # one of them
 *     bun run bench server --beside OLD/server.ts  # and another version of it
 *     bun run bench --rounds 3       # fewer rounds: quicker, and less to rely on
 *     bun run bench files --write    # RESULTS.md and results.svg too, where this takes the place of what it measures
 *
 * How it measures is in README.md. `--seconds S` is for each measurement with wrk, `--workload-seconds S` the time
 * after which no other round begins, `--draw` draws again from results.json without measuring.
 */
import { parseArgs } from "node:util";
import { benchClient } from "./client.ts";
import { writeDrawing } from "./draw.ts";
import { benchFiles } from "./files.ts";
import { cleanUp, type Effort } from "./measure.ts";
import { formatTable, writeReport } from "./report.ts";
import { describe, readResults, type Results, type Subject, SUBJECTS, writeResults } from "./results.ts";
import { benchServer } from "./server.ts";

const BENCHES = { server: benchServer, client: benchClient, files: benchFiles } as const;

/** Many short rounds: what else the machine does then spoils some of them, and the median is of the others. */
const EFFORT: Effort = { rounds: 7, seconds: 1, workloadSeconds: 60 };

interface CommandLine {
  readonly subjects: readonly Subject[];
  readonly effort: Effort;
  /** Another version of server.ts, to be measured beside it. */
  readonly beside: string | undefined;
  readonly write: boolean;
  readonly draw: boolean;
}

function parseCount(name: string, text: string | undefined, otherwise: number): number {
  if (text === undefined) return otherwise;
  if (!/^[1-9]\d{0,3}$/.test(text)) throw new Error(`--${name} takes a number from 1 to 9999, not ${text}`);
  return Number(text);
}

function parseCommandLine(args: string[]): CommandLine {
  const [string, boolean] = [{ type: "string" } as const, { type: "boolean" } as const];
  const options = {
    beside: string,
    rounds: string,
    seconds: string,
    "workload-seconds": string,
    write: boolean,
    draw: boolean,
  };
  const { values, positionals } = parseArgs({ args, options, allowPositionals: true });
  const subjects = SUBJECTS.filter((subject) => positionals.length === 0 || positionals.includes(subject));
  if (positionals.some((name) => !SUBJECTS.some((subject) => subject === name)))
    throw new Error(`there is to measure: ${SUBJECTS.join(", ")}; not ${positionals.join(" ")}`);
  return {
    subjects,
    effort: {
      rounds: parseCount("rounds", values.rounds, EFFORT.rounds),
      seconds: parseCount("seconds", values.seconds, EFFORT.seconds),
      workloadSeconds: parseCount("workload-seconds", values["workload-seconds"], EFFORT.workloadSeconds),
    },
    beside: values.beside,
    write: values.write ?? false,
    draw: values.draw ?? false,
  };
}

/** Writes all that is drawn from the results. */
async function publish(results: Results): Promise<void> {
  writeResults(results);
  writeDrawing(results);
  await writeReport(results);
}

async function measure({ subjects, effort, beside, write }: CommandLine): Promise<void> {
  const command = `bun run bench ${process.argv.slice(2).join(" ")}`.trim();
  for (const subject of subjects) {
    const start = performance.now();
    const result = describe(command, await BENCHES[subject](effort, beside));
    console.log(`${formatTable(subject, result)}\n`);
    console.error(`${subject}: ${Math.round((performance.now() - start) / 1000)} s\n`);
    // Each is kept at once: a failure of the next takes nothing from it.
    if (write) await publish({ ...readResults(), [subject]: result });
  }
}

/** Set as soon as a signal has ended the run: what fails then fails because of it. */
let isGivenUp = false;

/** Ends everything that this run has started, and itself. */
async function giveUp(exitCode: number, message: string): Promise<void> {
  if (isGivenUp) return;
  isGivenUp = true;
  console.error(message);
  await cleanUp();
  process.exit(exitCode);
}

async function main(): Promise<void> {
  const commandLine = parseCommandLine(process.argv.slice(2));
  if (commandLine.draw) return publish(readResults());
  const exitCodes = { SIGHUP: 129, SIGINT: 130, SIGTERM: 143 } as const;
  for (const [signal, exitCode] of Object.entries(exitCodes))
    process.on(signal, () => void giveUp(exitCode, `\n${signal}: given up`));
  await measure(commandLine);
}

if (import.meta.main)
  try {
    await main();
    await cleanUp();
  } catch (error) {
    await giveUp(1, `Error: ${(error as Error).message}`); // nothing here throws anything else
  }
