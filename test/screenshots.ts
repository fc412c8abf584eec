/**
 * Takes pictures of the page that lists a folder, light and dark, on a desktop and on a phone. docs/listing.png is one of
 * them, shared-desktop-light.png:
 *   bun test/screenshots.ts DIR_OUT [SERVER]     SERVER: another server.ts to look at
 */
import { mkdirSync, writeFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { DESKTOP, makeExampleFolder, ODD_NAMES, PHONE, startBrowser, Tab } from "./browser.ts";
import { LISTENING, ROOT, start, temporaryFolder } from "./harness.ts";

async function main([out, script = join(ROOT, "server.ts")]: string[]): Promise<number> {
  if (out === undefined) {
    console.error("Usage: bun test/screenshots.ts DIR_OUT [SERVER]");
    return 2;
  }
  mkdirSync(out, { recursive: true });
  await using folder = await temporaryFolder();
  const [shared, odd] = [join(folder.path, "shared"), join(folder.path, "odd names")];
  for (const path of [shared, odd, join(folder.path, "empty")]) mkdirSync(path);
  makeExampleFolder(shared);
  for (const name of ODD_NAMES) writeFileSync(join(odd, name), name);

  const argv = [process.execPath, resolve(script), "--port", "0", "--log", "off", "--root", folder.path];
  await using server = await start(argv, LISTENING);
  await using browser = await startBrowser();
  using tab = await Tab.open(browser.url);
  for (const page of ["shared", "odd names", "empty"])
    for (const [device, size] of Object.entries({ desktop: DESKTOP, phone: PHONE }))
      for (const scheme of ["light", "dark"] as const) {
        await tab.emulate(size, scheme);
        await tab.navigate(`${server.match[0]}/${encodeURIComponent(page)}/`);
        const file = join(out, `${page.replace(" ", "-")}-${device}-${scheme}.png`);
        await Bun.write(file, await tab.view.screenshot());
        console.log(file);
      }
  return 0;
}

if (import.meta.main) process.exitCode = await main(process.argv.slice(2));
