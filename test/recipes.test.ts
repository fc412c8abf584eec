/**
 * The recipes of the README, and the container of docs/reference.md, as they stand there: each command in a folder of its
 * own, on ports of its own.
 */
import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { cpSync, existsSync, mkdirSync, readFileSync, rmSync, statSync, utimesSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { command, freePort, LISTENING, ROOT, run, start, temporaryFolder } from "./harness.ts";

setDefaultTimeout(60_000);

/** The first block of commands after a text. */
function blockAfter(page: string, text: string): string {
  const [, rest = ""] = readFileSync(join(ROOT, page), "utf8").split(text);
  const block = /^```sh\n(.*?)^```$/ms.exec(rest)?.[1] ?? "";
  expect(block, `${page}: ${text}`).not.toBe("");
  return block;
}
const recipe = (text: string) => blockAfter("README.md", text);

const CONTENT = "recipe\n".repeat(1000);
const CONTENT_SHA256 = new Bun.CryptoHasher("sha256").update(CONTENT).digest("hex");
/** README says what to do where there is no IPv6. */
const hasIpv6 = existsSync("/proc/net/if_inet6") && readFileSync("/proc/net/if_inet6", "utf8") !== "";

/** A folder with the scripts, as a clone has them, and a port instead of 8888 and 8080. */
async function makePlace() {
  const folder = await temporaryFolder();
  const port = String(await freePort());
  for (const name of ["server.ts", "client-robust.ts"]) cpSync(join(ROOT, name), join(folder.path, name));
  const env = { PATH: `${dirname(process.execPath)}:${process.env["PATH"]}`, PORT: port };
  const withPort = (text: string) =>
    text.replace(/8888|8080/g, port).replace("--host ::", hasIpv6 ? "--host ::" : "--host 0.0.0.0");
  return {
    folder: folder.path,
    run: (block: string) => run(["bash", "-ec", withPort(block)], { cwd: folder.path, env }),
    /** Runs all of a block; its last line is a server, which goes on. `timeout` passes SIGTERM on to it, not SIGKILL. */
    async start(block: string) {
      const code = withPort(block).replace(/\n(?=.*\n$)/, "\nexec ");
      const server = await start(["bash", "-ec", code], LISTENING, { cwd: folder.path, env });
      const stop = async () => {
        server.child.kill();
        await server.child.exited;
      };
      return { stop, [Symbol.asyncDispose]: stop };
    },
    [Symbol.asyncDispose]: () => folder[Symbol.asyncDispose](),
  };
}

describe("a recipe of the README", () => {
  test.concurrent("shares a folder; a file is fetched from there, by its digest too, and mirrored", async () => {
    await using place = await makePlace();
    const file = (name: string) => join(place.folder, name);
    await using server = await place.start(recipe("**Share a folder for an hour**"));
    for (const name of ["large.bin", "image.iso"]) writeFileSync(file(`shared/${name}`), CONTENT);
    expect((await place.run(recipe("**Fetch a file from there**"))).exitCode).toBe(0);
    expect(readFileSync(file("large.bin"), "utf8")).toBe(CONTENT);

    const byDigest = recipe("**Fetch a file whose digest you know**");
    const told = /[0-9a-f]{64}/.exec(byDigest)?.[0] ?? "";
    const wrong = await place.run(byDigest);
    expect([wrong.exitCode, existsSync(file("image.iso"))]).toEqual([29, false]);
    expect((await place.run(byDigest.replace(told, CONTENT_SHA256))).exitCode).toBe(0);
    expect(readFileSync(file("image.iso"), "utf8")).toBe(CONTENT);

    const mirror = recipe("**A mirror by cron.**");
    rmSync(file("large.bin"));
    for (const [content, year] of [
      [CONTENT, 2001],
      ["newer", 2002],
      ["as old as before", 2002],
    ] as const) {
      writeFileSync(file("shared/large.bin"), content);
      utimesSync(file("shared/large.bin"), new Date(`${year}`), new Date(`${year}`));
      expect((await place.run(mirror)).exitCode).toBe(0);
      expect(readFileSync(file("large.bin"), "utf8")).toBe(year === 2001 ? CONTENT : "newer");
      expect(statSync(file("large.bin")).mtime.getUTCFullYear()).toBe(year);
    }
    await server.stop();
    expect(
      (await place.run(mirror.replace("bun client-robust.ts", "bun client-robust.ts --retry 0"))).exitCode,
    ).not.toBe(0);
    expect(readFileSync(file("large.bin"), "utf8")).toBe("newer");
  });

  test.concurrent("is a health endpoint that can be waited for", async () => {
    await using place = await makePlace();
    const waiting = place.run(recipe("**Wait until a server is up**"));
    await using _ = await place.start(`true\n${recipe("**A health endpoint**")}`);
    const { stdout, stderr, exitCode } = await waiting;
    expect([stdout, stderr, exitCode]).toEqual(["up\n", "", 0]);
  });

  test.concurrent("speaks TLS with a certificate that signs itself", async () => {
    await using place = await makePlace();
    await using _ = await place.start(recipe("**TLS** hides"));
    const fetch = recipe("--tls-key key.pem\n```");
    const { stdout, exitCode } = await place.run(fetch);
    expect([stdout.endsWith("\r\n\r\nHello, World!"), exitCode]).toEqual([true, 0]);
    expect((await place.run(fetch.replace("--cacert cert.pem ", ""))).exitCode).toBe(60);
  });
});

/** Root, or a user who may be root in a namespace, can have a root folder and a process 1 of his own. */
const NAMESPACE = ["unshare", "--map-root-user", "--mount", "--pid", "--fork"];
const canChroot = Bun.spawnSync([...NAMESPACE, "sh", "-c", "mount -t proc proc /proc && chroot / true"]).success;
if (!canChroot) console.warn("left out: the container, since this machine allows no namespaces");

test.if(canChroot)("a container without a distribution: process 1, its health check, and its end", async () => {
  await using place = await makePlace();
  const [binary = ""] = await command("server", "binary");
  const collect = blockAfter("docs/reference.md", "This collects them in `rootfs`").replaceAll(
    "dist/",
    `${dirname(binary)}/`,
  );
  const collected = await place.run(collect);
  expect([collected.stderr, collected.exitCode]).toEqual(["", 0]);
  const rootfs = join(place.folder, "rootfs");
  writeFileSync(join(rootfs, "srv/file.txt"), CONTENT);
  for (const name of ["proc", "dev"]) mkdirSync(join(rootfs, name));

  // The commands of the Dockerfile.
  const dockerfile =
    /^```dockerfile\n(.*?)^```$/ms.exec(readFileSync(join(ROOT, "docs/reference.md"), "utf8"))?.[1] ?? "";
  const port = String(await freePort());
  const line = (word: string): string[] =>
    JSON.parse(new RegExp(`^${word} (\\[.*\\])$`, "m").exec(dockerfile)?.[1]?.replaceAll("8080", port) ?? "[]");
  const setUp = 'mount --rbind /dev "$0/dev" && mount -t proc proc "$0/proc" && exec chroot "$0" "$@"';
  const inside = [...NAMESPACE, "sh", "-c", setUp, rootfs];
  await using server = await start([...inside, ...line("ENTRYPOINT")], LISTENING);

  const got = await fetch(`http://127.0.0.1:${port}/file.txt`);
  expect([got.status, await got.text()]).toEqual([200, CONTENT]);
  const healthy = await run([...inside, ...line("HEALTHCHECK CMD")]);
  expect([healthy.stdout, healthy.stderr, healthy.exitCode]).toEqual(["", "", 0]);
  const isLine = /"GET \/ HTTP\/1.1" 200 \d+ "-" "http-over-tcp/;
  await server.stdout.waitFor(isLine);

  // Process 1 gets only the signals that it handles. unshare hands none on, so it is sent to its child.
  const [child = ""] = readFileSync(`/proc/${server.child.pid}/task/${server.child.pid}/children`, "utf8").split(" ");
  process.kill(Number(child), "SIGTERM");
  expect(await server.child.exited).toBe(0);
  const sick = await run([...inside, ...line("HEALTHCHECK CMD")]);
  expect(sick.exitCode).toBe(7);
});
