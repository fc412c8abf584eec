/** The page that lists a folder, and what is served below it, as Chromium sees them. */
import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { closeSync, ftruncateSync, linkSync, mkdirSync, openSync, writeFileSync, writeSync } from "node:fs";
import { join } from "node:path";
import { DESKTOP, makeExampleFolder, ODD_NAMES, PHONE, startBrowser, Tab } from "./browser.ts";
import { hasTool, startServer, temporaryFolder } from "./harness.ts";

setDefaultTimeout(60_000);

const hasChromium = hasTool("chromium");

/** A server for the files below a new folder, which `fill` makes. */
async function serveFolder(fill: (root: string) => void, ...args: string[]) {
  await using stack = new AsyncDisposableStack();
  const { path } = stack.use(await temporaryFolder());
  fill(path);
  const server = stack.use(await startServer("script", ["--log", "off", "--root", path, ...args]));
  const resources = stack.move();
  return { ...server, [Symbol.asyncDispose]: () => resources.disposeAsync() };
}

const makeFiles = (folder: string, names: readonly string[]) => {
  mkdirSync(folder, { recursive: true });
  for (const name of names) writeFileSync(join(folder, name), `this is ${name}`);
};

/** The last segment of the path of a URL, as a name. */
const nameIn = (url: string) => decodeURIComponent(/([^/]*)\/?$/.exec(new URL(url).pathname)?.[1] ?? "");

/** Where the links of the page lead, as the browser resolves them; not the one to the parent folder, the first. */
const LINKS = "[...document.links].map((link) => link.href).slice(1)";

/** A WAV file of silence, 8 bytes a frame: Chromium fetches some MB in advance, so what it seeks must lie behind them. */
function writeSilence(path: string, seconds: number): void {
  const [rate, frame] = [192_000, 8];
  const length = seconds * rate * frame;
  const head = Buffer.alloc(44);
  head.write("RIFF    WAVEfmt ", 0, "latin1");
  head.writeUInt32LE(36 + length, 4);
  head.writeUInt32LE(16, 16);
  head.writeUInt16LE(1, 20); // PCM
  head.writeUInt16LE(4, 22); // channels
  head.writeUInt32LE(rate, 24);
  head.writeUInt32LE(rate * frame, 28);
  head.writeUInt16LE(frame, 32);
  head.writeUInt16LE(16, 34); // bits of a sample
  head.write("data", 36, "latin1");
  head.writeUInt32LE(length, 40);
  const file = openSync(path, "w");
  writeSync(file, head);
  ftruncateSync(file, head.length + length); // a hole: it takes no room on the disk
  closeSync(file);
}

/**
 * Runs in the page. What is written in it with its colour on that of the page, and the contrast of the two (WCAG 2.2
 * §1.4.3), the lowest first.
 */
function measureContrasts() {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  if (context === null) throw new Error("no canvas");
  const rgba = (color: string) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = color;
    context.fillRect(0, 0, 1, 1);
    const [red = 0, green = 0, blue = 0, alpha = 0] = context.getImageData(0, 0, 1, 1).data;
    return { channels: [red, green, blue], alpha: alpha / 255 };
  };
  const style = (element: Element) => getComputedStyle(element);
  // If the page has no background, it is that of the colour scheme: a system colour, which has to be asked for.
  const probe = document.body.appendChild(document.createElement("i"));
  probe.style.color = "Canvas";
  const page = [document.body, document.documentElement].map((element) => rgba(style(element).backgroundColor));
  const background = page.find(({ alpha }) => alpha === 1) ?? rgba(style(probe).color);
  probe.remove();
  const luminance = (channels: number[]) => {
    const [red = 0, green = 0, blue = 0] = channels
      .map((value) => value / 255)
      .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const contrast = (element: Element) => {
    const text = rgba(style(element).color);
    let { alpha } = text;
    for (let at: Element | null = element; at !== null; at = at.parentElement) alpha *= Number(style(at).opacity);
    const mixed = text.channels.map((value, i) => value * alpha + (background.channels[i] ?? 0) * (1 - alpha));
    const [low = 0, high = 0] = [luminance(mixed), luminance(background.channels)].toSorted((a, b) => a - b);
    return {
      text: element.textContent,
      colors: `${mixed.map(Math.round)} on ${background.channels}`,
      contrast: (high + 0.05) / (low + 0.05),
    };
  };
  const isText = ({ nodeType, nodeValue }: ChildNode) => nodeType === Node.TEXT_NODE && nodeValue?.trim() !== "";
  const written = [...document.body.querySelectorAll("*")].filter((element) => [...element.childNodes].some(isText));
  return written.map(contrast).toSorted((a, b) => a.contrast - b.contrast);
}

describe.skipIf(!hasChromium)("listing", () => {
  let browser: Awaited<ReturnType<typeof startBrowser>>;
  let tab: Tab;

  beforeAll(async () => {
    browser = await startBrowser();
    tab = await Tab.open(browser.url);
  });

  afterAll(async () => {
    tab?.[Symbol.dispose]();
    await browser?.[Symbol.asyncDispose]();
  });

  test("links to every file, whatever its name is", async () => {
    await using server = await serveFolder((root) => makeFiles(join(root, "odd"), ODD_NAMES));
    await tab.navigate(`${server.url}/odd/`);
    const links = await tab.evaluate<string[]>(LINKS);
    expect(links.map(nameIn).toSorted()).toEqual(ODD_NAMES.toSorted());
    for (const link of links) {
      expect(link).toStartWith(`${server.url}/odd/`);
      expect(await (await fetch(link)).text()).toBe(`this is ${nameIn(link)}`);
    }
  });

  test("clicks lead into folders with names that look like something else, and out again", async () => {
    const marks = ["?query", "#hash", "%2e%2e", "~", "-", " leading", "trailing ", "[::1]", "\u202egnp.exe", "😀"];
    const names = ["javascript:alert(1)", "<script>alert(1)", ...marks];
    await using server = await serveFolder((root) => mkdirSync(join(root, ...names), { recursive: true }));
    await tab.navigate(server.url);
    let url = `${server.url}/`;
    for (const [depth, name] of names.entries()) {
      const above = url;
      url += `${encodeURIComponent(name)}/`;
      expect(await tab.follow(depth === 0 ? 0 : 1)).toBe(url);
      if (depth === names.length - 1) expect(await tab.follow(0)).toBe(above);
    }
  });

  test("shows a file that is clicked", async () => {
    await using server = await serveFolder((root) => makeFiles(root, ["100% <b>.txt"]));
    await tab.navigate(server.url);
    expect(await tab.follow(0)).toBe(`${server.url}/100%25%20%3Cb%3E.txt`);
    expect(await tab.evaluate<string>("document.body.textContent")).toBe("this is 100% <b>.txt");
  });

  test("shows names so that they can be told apart, and none can hide what it is", async () => {
    await using server = await serveFolder((root) => makeFiles(root, ODD_NAMES));
    await tab.navigate(server.url);
    const shown = await tab.evaluate<string[]>("[...document.links].map((link) => link.innerText)");
    expect(new Set(shown).size).toBe(ODD_NAMES.length);
    expect(shown).toContain("\\u{202e}gnp.exe");
    expect(shown).toContain("\\x1b[31mred\\x1b[0m");
  });

  test("leaves out what starts with a dot, and what is no text", async () => {
    const noText = Buffer.from("latin1-\xfc", "latin1");
    await using server = await serveFolder((root) => {
      makeFiles(root, ["...", ".hidden", "back\\slash", "shown"]);
      writeFileSync(Buffer.concat([Buffer.from(`${root}/`), noText]), "");
    });
    await tab.navigate(server.url);
    expect(await tab.evaluate<string[]>("[...document.links].map((link) => link.innerText)")).toEqual([
      "back\\slash",
      "shown",
    ]);
    expect(await tab.evaluate<string>("document.querySelector('p').innerText")).toContain("1 name that is not UTF-8");
  });

  test("runs nothing, loads nothing, and says nothing on the console", async () => {
    await using server = await serveFolder((root) =>
      makeFiles(join(root, "<", "title><script>alert(1)<", "script>"), ODD_NAMES),
    );
    tab.complaints.length = 0;
    const path = "</title><script>alert(1)</script>";
    await tab.navigate(`${server.url}/${path.split("/").map(encodeURIComponent).join("/")}/`);
    expect(await tab.evaluate<string>("document.title")).toContain(`/${path}/`);
    expect(await tab.evaluate<string>("document.querySelector('h1').innerText")).toBe(`/${path}/`);
    const foreign = "script, img, iframe, object, embed, link, form, input, [autofocus], [onerror], [onfocus], b, base";
    expect(await tab.evaluate<number>(`document.querySelectorAll(${JSON.stringify(foreign)}).length`)).toBe(0);
    expect(await tab.evaluate<string[]>("performance.getEntriesByType('resource').map(({ name }) => name)")).toEqual(
      [],
    );
    expect(tab.complaints).toEqual([]);
    // If something were there, it would be heard of, and it would not run.
    const script = "document.body.appendChild(document.createElement('script')).append('document.title = \"ran\"')";
    await tab.evaluate(script);
    expect(tab.complaints).toHaveLength(1);
    expect(tab.complaints[0]).toContain("Content Security Policy");
    expect(await tab.evaluate<string>("document.title")).not.toBe("ran");
  });

  test("has a policy that lets in its own style alone, and the style applies", async () => {
    await using server = await serveFolder((root) => makeFiles(root, ["a"]));
    const response = await fetch(server.url);
    const style = /<style>([^]*)<\/style>/.exec(await response.text())?.[1] ?? "";
    const digest = new Bun.CryptoHasher("sha256").update(style).digest("base64");
    const policy = response.headers.get("Content-Security-Policy");
    expect(policy).toStartWith(`default-src 'none'; style-src 'sha256-${digest}'; `);
    expect(response.headers.get("X-Content-Type-Options")).toBe("nosniff");
    expect(response.headers.get("Content-Type")).toBe("text/html; charset=utf-8");
    await tab.navigate(server.url);
    expect(await tab.evaluate<string>("getComputedStyle(document.links[0]).overflowWrap")).toBe("anywhere");
  });

  test("has a title, a language, a heading, a list and times, for screen readers and programs", async () => {
    await using server = await serveFolder((root) => makeExampleFolder(join(root, "shared")));
    await tab.navigate(`${server.url}/shared/`);
    expect(await tab.evaluate<string>("document.documentElement.lang")).toBe("en");
    expect(await tab.evaluate<string>("document.title")).toContain("/shared/");
    const roles = await tab.roles();
    expect(roles.get("heading")).toEqual(["/shared/"]);
    expect(roles.get("list")).toHaveLength(1);
    expect(roles.get("listitem")).toHaveLength(14);
    expect(roles.get("link")?.slice(1, 5)).toEqual(["Music/", "photos 2025/", "talk-slides/", "chapter 1.txt"]);
    const times = await tab.evaluate<string[]>("[...document.querySelectorAll('time')].map((time) => time.dateTime)");
    expect(times[0]).toBe("2026-03-02T18:20:00.000Z");
  });

  test("puts folders first, and numbers in their order", async () => {
    const files = ["file10", "file9", "File 1", "b", "Ä", "a", "z"];
    await using server = await serveFolder((root) => {
      makeFiles(root, files);
      for (const folder of ["z10", "z9", "y"]) mkdirSync(join(root, folder));
    });
    await tab.navigate(server.url);
    const shown = await tab.evaluate<string[]>("[...document.links].map((link) => link.innerText)");
    expect(shown).toEqual(["y/", "z9/", "z10/", "a", "Ä", "b", "File 1", "file9", "file10", "z"]);
  });

  test("leads to the parent folder, also where slashes stand in a row", async () => {
    await using server = await serveFolder((root) => makeFiles(join(root, "dir", "sub"), ["here"]));
    const heading = () => tab.evaluate<string>("document.querySelector('h1').innerText");
    const shown = () => tab.evaluate<string[]>("[...document.links].map((link) => link.innerText)");
    for (const path of ["/dir/sub", "//dir//sub/"]) {
      await tab.navigate(`${server.url}${path}`);
      await tab.follow(0);
      expect(await heading()).toBe("/dir/");
      await tab.follow(1);
      expect(await heading()).toBe("/dir/sub/");
    }
    await tab.navigate(`${server.url}//dir/`);
    await tab.follow(0);
    expect(await heading()).toBe("/");
    await tab.follow(0);
    expect(await heading()).toBe("/dir/");
    expect(new URL(tab.view.url).origin).toBe(server.url);
    await tab.navigate(server.url);
    expect(await shown()).toEqual(["dir/"]); // the root has none
  });

  test("fits a phone and a desktop, with names of 255 bytes and deep paths", async () => {
    const deep = ["x".repeat(255), "ü".repeat(127)];
    await using server = await serveFolder((root) => makeFiles(join(root, ...deep), ODD_NAMES));
    for (const size of [PHONE, DESKTOP]) {
      await tab.emulate(size, "light");
      await tab.navigate(`${server.url}/${deep.map(encodeURIComponent).join("/")}/`);
      expect(await tab.evaluate<number>("document.documentElement.scrollWidth")).toBe(size.width);
      expect(await tab.evaluate<number>("innerWidth")).toBe(size.width);
    }
  });

  test("is legible in light and in dark", async () => {
    await using server = await serveFolder((root) => makeExampleFolder(join(root, "shared")));
    const seen = new Set<string>();
    for (const scheme of ["light", "dark"] as const) {
      await tab.emulate(DESKTOP, scheme);
      await tab.navigate(`${server.url}/shared/`);
      const contrasts = await tab.evaluate<ReturnType<typeof measureContrasts>>(`(${measureContrasts})()`);
      expect(contrasts.length).toBeGreaterThan(30);
      expect(contrasts.filter(({ contrast }) => contrast < 4.5)).toEqual([]);
      for (const { colors } of contrasts) seen.add(colors);
    }
    const backgrounds = new Set([...seen].map((colors) => colors.split(" on ")[1]));
    expect(backgrounds.size).toBe(2);
    await tab.emulate(DESKTOP, "light");
  });

  test("says that there is more than it lists", async () => {
    await using server = await serveFolder((root) => {
      makeFiles(join(root, "many"), ["0"]);
      for (let i = 1; i <= 10_000; i++) linkSync(join(root, "many", "0"), join(root, "many", String(i)));
    });
    await tab.navigate(`${server.url}/many/`);
    expect(await tab.evaluate<number>("document.links.length")).toBe(1 + 10_000);
    expect(await tab.evaluate<string>("document.querySelector('p').innerText")).toContain("and 1 more");
  });

  test.each(["audio", "video"])("lets <%s> seek, by a range, and play on", async (element) => {
    await using server = await serveFolder(
      (root) => {
        writeSilence(join(root, "silence.wav"), 30);
        writeFileSync(
          join(root, "play.html"),
          `<!DOCTYPE html><${element} src=silence.wav preload=metadata muted></${element}>`,
        );
      },
      "--log",
      "request",
    );
    const statuses = new Set<number>();
    await tab.onResponse("/silence.wav", (status) => statuses.add(status));
    await tab.navigate(`${server.url}/play.html`);
    const at = await tab.evaluate<number[]>(`(async () => {
      const media = document.querySelector(${JSON.stringify(element)});
      const next = (type) => new Promise((resolve, reject) => {
        media.addEventListener(type, resolve, { once: true });
        media.addEventListener("error", () => reject(new Error(media.error.message)), { once: true });
      });
      if (media.readyState === 0) await next("loadedmetadata");
      const seeked = next("seeked");
      media.currentTime = 20;
      await seeked;
      const from = media.currentTime;
      await media.play();
      while (media.currentTime <= from) await next("timeupdate");
      return [media.duration, from, media.currentTime];
    })()`);
    expect(at[0]).toBe(30);
    expect(at[1]).toBe(20);
    expect(at[2]).toBeGreaterThan(20);
    // The first request asks for a range, too: for all of it.
    await server.stdout.waitFor(/^Range: bytes=[1-9]\d{6,}-/m);
    expect([...statuses]).toEqual([206]);
  });
});
