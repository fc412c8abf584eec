/**
 * Starts Chromium without a window, opens pages in it by Bun.WebView, and makes folders that are worth looking at.
 */
import { mkdirSync, utimesSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { start, temporaryFolder } from "./harness.ts";

/** No sandbox: it needs a kernel that lets users have namespaces, and what is opened is ours. */
const CHROMIUM_FLAGS = [
  "--headless",
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
  "--no-first-run",
  "--hide-scrollbars",
  "--autoplay-policy=no-user-gesture-required",
  "--remote-debugging-port=0",
];

export type Size = { width: number; height: number };
export const DESKTOP: Size = { width: 1280, height: 800 };
export const PHONE: Size = { width: 360, height: 740 };

/**
 * Starts Chromium. Bun.WebView could do that as well, but would end the first of its processes only, and leave their
 * files in the system's folders: here all of them are waited for, and all that they write is in one folder that goes.
 * Bun.WebView talks to one browser in the life of a process: a second one cannot be started beside this one.
 */
export async function startBrowser() {
  const folder = await temporaryFolder();
  const argv = ["chromium", ...CHROMIUM_FLAGS, `--user-data-dir=${join(folder.path, "profile")}`];
  const env = { HOME: folder.path, TMPDIR: folder.path, XDG_CONFIG_HOME: folder.path, XDG_CACHE_HOME: folder.path };
  const chromium = await start(argv, /DevTools listening on (\S+)/, { env }).catch(async (error: unknown) => {
    await folder[Symbol.asyncDispose]();
    throw error;
  });
  const dispose = async () => {
    await chromium[Symbol.asyncDispose]();
    // The other processes end when they miss the first one. Each has its stderr, which ends with the last of them.
    await chromium.stderr.waitFor(/(?!)/).catch(() => {});
    await folder[Symbol.asyncDispose]();
  };
  return { url: chromium.match[1] ?? "", [Symbol.asyncDispose]: dispose };
}

/** The parameters of an event of Chromium's. bun-types 1.4.5 takes the event for its class: hence the cast. */
const dataOf = <T>(event: unknown) => (event as MessageEvent<T>).data;

/** A tab: what Bun.WebView offers, and what a test of pages needs besides. */
export class Tab {
  /** What no page of ours may cause: messages on the console, among them violations of a policy; errors; dialogs. */
  readonly complaints: string[] = [];

  private constructor(readonly view: Bun.WebView) {}

  /** @param browser where it listens, as `startBrowser` tells */
  static async open(browser: string): Promise<Tab> {
    const tab = new Tab(new Bun.WebView({ ...DESKTOP, backend: { type: "chrome", url: browser } }));
    try {
      await tab.view.navigate("about:blank"); // before it there is no session to send commands to
      await tab.collectComplaints();
    } catch (error) {
      tab.view.close();
      throw error;
    }
    return tab;
  }

  private async collectComplaints(): Promise<void> {
    const events = [
      "Log.entryAdded",
      "Runtime.consoleAPICalled",
      "Runtime.exceptionThrown",
      "Page.javascriptDialogOpening",
    ] as const;
    for (const type of events)
      this.view.addEventListener(type, (event) => {
        this.complaints.push(`${type} ${JSON.stringify(dataOf(event))}`);
      });
    for (const domain of ["Log", "Runtime", "Page"]) await this.view.cdp(`${domain}.enable`);
  }

  navigate(url: string): Promise<void> {
    return this.view.navigate(url);
  }

  evaluate<T>(expression: string): Promise<T> {
    return this.view.evaluate<T>(expression);
  }

  /** Clicks the link, of those on the page the one with this index, and waits for what it leads to. @returns its URL */
  async follow(link: number): Promise<string> {
    await this.evaluate(`document.links[${link}].id = "followed"`);
    await this.view.scrollTo("#followed");
    // Bun.WebView's onNavigated comes before there is anything on the page, and "Page.loadEventFired" it keeps to itself.
    const loaded = new Promise((resolve) => {
      this.view.addEventListener("Page.domContentEventFired", resolve, { once: true });
    });
    await this.view.click("#followed");
    await loaded;
    return this.evaluate("location.href");
  }

  /** Calls with the status of each response to a request for the path, from now on. */
  async onResponse(path: string, call: (status: number) => void): Promise<void> {
    this.view.addEventListener("Network.responseReceived", (event) => {
      const { response } = dataOf<{ response: { url: string; status: number } }>(event);
      if (new URL(response.url).pathname === path) call(response.status);
    });
    await this.view.cdp("Network.enable");
  }

  /** What the page is to a screen reader: the names of what there is, by role. */
  async roles(): Promise<Map<string, string[]>> {
    type Node = { ignored: boolean; role?: { value: string }; name?: { value: string } };
    const { nodes } = await this.view.cdp<{ nodes: Node[] }>("Accessibility.getFullAXTree");
    const roles = Map.groupBy(
      nodes.filter(({ ignored }) => !ignored),
      ({ role }) => role?.value ?? "",
    );
    return new Map([...roles].map(([role, found]) => [role, found.map(({ name }) => name?.value ?? "")]));
  }

  /** As a phone shows it: of this width, and no narrower than what is on the page needs. */
  async emulate({ width, height }: Size, colorScheme: "light" | "dark"): Promise<void> {
    const isPhone = width <= PHONE.width;
    const metrics = { width, height, deviceScaleFactor: isPhone ? 2 : 1, mobile: isPhone };
    await this.view.cdp("Emulation.setDeviceMetricsOverride", metrics);
    const features = [{ name: "prefers-color-scheme", value: colorScheme }];
    await this.view.cdp("Emulation.setEmulatedMedia", { features });
  }

  [Symbol.dispose](): void {
    this.view.close();
  }
}

/** Names that a file may have, and that a page, a link or a terminal may take for something else. */
export const ODD_NAMES: readonly string[] = [
  ..." leading|trailing |two  spaces|two spaces|new\nline|tab\there|\x1b[31mred\x1b[0m".split("|"),
  ..."100%|%2e%2e|%41|#hash|a#b|?query|a?b=c&d=e|&amp;|&lt;b&gt;|a+b|a;b|a,b|a=b|@|$HOME|*|[::1]|{{x}}|^".split("|"),
  `"double"`,
  "'single'",
  "`tick`",
  "<script>alert(1)",
  "<img src=x onerror=alert(1)>",
  `" autofocus onfocus="alert(1)`,
  ..."a:b|javascript:alert(1)|http:|data:text,x|mailto:x|c:|-|--help|~|~root|_|CON|0|null|constructor".split("|"),
  "\u202egnp.exe", // the rest is shown from right to left: "exe.png"
  "\u2066isolated",
  "\ufeffmark",
  "grüße",
  "gru\u0308\u00dfe", // the same in two code points: another name
  "日本語",
  "العربية 123",
  "😀",
  "👩‍👩‍👧",
  "x".repeat(255),
  "ü".repeat(127),
  "many words ".repeat(22) + "that wrap",
];

/** A folder as somebody might share it, to look at its page. */
export function makeExampleFolder(root: string): void {
  const write = (name: string, size: number, date: string) => {
    const path = join(root, name);
    if (name.endsWith("/")) mkdirSync(path, { recursive: true });
    else writeFileSync(path, new Uint8Array(size));
    utimesSync(path, new Date(date), new Date(date));
  };
  write("Music/", 0, "2026-03-02T18:20:00Z");
  write("photos 2025/", 0, "2026-01-11T09:05:00Z");
  write("talk-slides/", 0, "2025-11-30T22:41:00Z");
  write("README.md", 4_812, "2026-05-04T07:12:00Z");
  write("chapter 1.txt", 28_190, "2026-02-01T12:00:00Z");
  write("chapter 2.txt", 30_544, "2026-02-08T12:00:00Z");
  write("chapter 10.txt", 27_001, "2026-04-05T12:00:00Z");
  write("empty", 0, "2024-12-31T23:59:00Z");
  write("image.iso", 52_428_800, "2026-05-02T15:33:00Z");
  write("notes.txt", 713, "2026-05-03T16:47:00Z");
  write("Résumé – für Ægir.pdf", 184_320, "2026-04-17T10:30:00Z");
  write(
    "setup-and-configuration-of-the-whole-thing-in-one-name-without-any-space.tar.gz",
    9_437_184,
    "2025-08-09T06:00:00Z",
  );
  write("العربية.txt", 2_048, "2026-01-20T08:08:00Z");
}
