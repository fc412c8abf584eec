/** server.ts --root with the clients that people point at a folder, each as it is called by default. */
import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { chmodSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { freePort, hasTool, run, start, startNginx, startServer, temporaryFolder } from "./harness.ts";
import { Random } from "./random.ts";

setDefaultTimeout(60_000);

const seed = Number(process.env["SEED"] ?? Date.now() % 2 ** 32);
const large = new Random(seed).bytes(3_000_000);

/** A name with a colon is one that Go and lftp write with "./" before it, and one with "%" may be decoded twice. */
const NAMES = ["a:b", "100% sure", "grüße", "it's", "a+b&c;d", "x\\y"];

describe("real clients of --root", () => {
  let site: Awaited<ReturnType<typeof makeSite>>;

  async function makeSite() {
    await using stack = new AsyncDisposableStack();
    const folder = stack.use(await temporaryFolder());
    const root = join(folder.path, "root");
    mkdirSync(join(root, "odd", "sub:folder"), { recursive: true });
    for (const name of NAMES) writeFileSync(join(root, "odd", name), `this is ${name}`);
    writeFileSync(join(root, "odd", "sub:folder", "deep"), "deep");
    mkdirSync(join(root, "odd", "plain"));
    writeFileSync(join(root, "odd", "plain", "z"), "z");
    writeFileSync(join(root, "large.bin"), large);
    const server = stack.use(await startServer("script", ["--root", root, "--log", "off"]));
    const resources = stack.move();
    const out = (name: string) => {
      const path = join(folder.path, name);
      mkdirSync(path, { recursive: true });
      return path;
    };
    return { root, url: server.url.replace("localhost", "127.0.0.1"), out, dispose: () => resources.disposeAsync() };
  }

  beforeAll(async () => {
    site = await makeSite();
  });
  afterAll(() => site?.dispose());

  /** What is in a folder, as it should be after a mirror. */
  const expectMirror = (path: string, folder = ["sub:folder", "sub:folder/deep"]) => {
    const found = readdirSync(path, { recursive: true }).map(String).toSorted();
    expect(found).toEqual([...NAMES, "plain", "plain/z", ...folder].toSorted());
    for (const name of NAMES) expect(readFileSync(join(path, name), "utf8")).toBe(`this is ${name}`);
  };

  const expectLarge = (path: string) => expect(readFileSync(path).equals(large)).toBeTrue();

  test.concurrent.if(hasTool("rclone"))("rclone copies a folder, every name of it", async () => {
    const to = site.out("rclone");
    const config = join(site.out("rclone-config"), "none");
    const argv = ["rclone", "--config", config, "--http-url", `${site.url}/odd`, "copy", ":http:", to];
    expect(await run(argv)).toMatchObject({ exitCode: 0 });
    // rclone 1.60 lists "./sub:folder/", but then takes none of the links in it for one below that, whatever the server.
    expectMirror(to, []);
  });

  test.concurrent.if(hasTool("lftp"))("lftp mirrors a folder, and gets a file in four parts", async () => {
    const to = site.out("lftp");
    const commands = `set net:max-retries 1; mirror odd ${to}/odd; pget -n 4 large.bin -o ${to}/large; quit`;
    expect(await run(["lftp", "-e", commands, site.url], { env: { HOME: to } })).toMatchObject({ exitCode: 0 });
    expectMirror(join(to, "odd"));
    expectLarge(join(to, "large"));
  });

  test.concurrent.if(hasTool("wget"))("wget mirrors a folder", async () => {
    const to = site.out("wget");
    const argv = ["wget", "-q", "-r", "-np", "-nH", "--cut-dirs=1", "-R", "index.html*", `${site.url}/odd/`];
    expect(await run(argv, { cwd: to, env: { LC_ALL: "C.UTF-8" } })).toMatchObject({ exitCode: 0 });
    expectMirror(to);
  });

  test.concurrent.if(hasTool("busybox"))("busybox wget sends dot segments as they are, and goes on", async () => {
    const to = site.out("busybox");
    writeFileSync(join(to, "large.bin"), large.subarray(0, 1_000_000));
    const wget = (...args: string[]) => run(["busybox", "wget", "-q", ...args], { cwd: to });
    expect(await wget("-c", `${site.url}/./odd/../large.bin`)).toMatchObject({ exitCode: 0 });
    expectLarge(join(to, "large.bin"));
    expect(await wget("-O", "deep", `${site.url}/odd/sub:folder/../../odd/./sub:folder/deep`)).toMatchObject({
      exitCode: 0,
    });
    expect(readFileSync(join(to, "deep"), "utf8")).toBe("deep");
  });

  test.concurrent("curl sees how dot segments are resolved, and that nothing is above the root", async () => {
    const status = async (path: string) => {
      const write = ["-o", join(site.out("curl"), "out"), "-w", "%{http_code}"];
      return (await run(["curl", "-s", "--path-as-is", ...write, `${site.url}${path}`])).stdout;
    };
    const paths = ["/./large.bin", "/odd/../large.bin", "/odd/%2e%2E/large.bin", "/odd/sub:folder/..", "/../large.bin"];
    const found = [];
    for (const path of paths) found.push(await status(path));
    expect(found).toEqual(["200", "200", "200", "200", "400"]);
  });

  test.concurrent("python urllib follows the redirect to a folder, and sends dot segments", async () => {
    const code = `
import sys, urllib.request, urllib.parse
base = sys.argv[1]
answer = urllib.request.urlopen(base + "/odd/./sub:folder")
print(answer.url[len(base):], "deep" in answer.read().decode())
print(urllib.request.urlopen(base + "/odd/../odd/" + urllib.parse.quote("100% sure")).read().decode())`;
    const { stdout, stderr } = await run(["python3", "-c", code, site.url]);
    expect([stderr, stdout]).toEqual(["", "/odd/sub%3Afolder/ True\nthis is 100% sure\n"]);
  });

  test.concurrent.if(hasTool("lynx"))("lynx shows names, sizes and times apart, and follows the links", async () => {
    const dump = (path: string) => run(["lynx", "-dump", "-nolist", "-width=200", `${site.url}${path}`]);
    expect((await dump("/")).stdout).toMatch(/large\.bin 2\.9 MiB \d{4}-\d\d-\d\d \d\d:\d\d\n/);
    expect((await dump("/odd/sub%3Afolder/deep")).stdout.trim()).toBe("deep");
    expect((await run(["lynx", "-dump", "-listonly", `${site.url}/odd/`])).stdout).toContain("/odd/a:b\n");
  });

  test.concurrent.if(hasTool("aria2c"))("aria2 gets a file in several parts at once", async () => {
    const to = site.out("aria2");
    const argv = ["aria2c", "--no-conf", "-q", "-x", "4", "-s", "4", "-k", "1M", "-d", to, "-o", "large"];
    expect(await run([...argv, `${site.url}/odd/../large.bin`])).toMatchObject({ exitCode: 0 });
    expectLarge(join(to, "large"));
  });

  test.concurrent.if(hasTool("zsync"))("zsync fetches the blocks that it lacks, by several ranges", async () => {
    const to = site.out("zsync");
    expect(
      await run(["zsyncmake", "-b", "2048", "-u", "large.bin", "-o", "../root/large.zsync", "../root/large.bin"], {
        cwd: to,
      }),
    ).toMatchObject({ exitCode: 0 });
    // The same file with some places that differ: those alone are fetched.
    const seedFile = Buffer.from(large);
    for (const at of [100_000, 900_000, 1_700_000, 2_500_000]) seedFile.fill(0, at, at + 5000);
    writeFileSync(join(to, "seed"), seedFile);
    const got = await run(["zsync", "-i", "seed", "-o", "large", `${site.url}/large.zsync`], { cwd: to });
    expect([got.exitCode, got.stdout + got.stderr]).toEqual([0, expect.stringContaining("checksum matches OK")]);
    expectLarge(join(to, "large"));
    const fetched = Number(/fetched (\d+)/.exec(got.stdout + got.stderr)?.[1]);
    expect(fetched).toBeGreaterThan(0);
    expect(fetched).toBeLessThan(200_000);
  });

  test.concurrent.if(hasTool("apt-get") && hasTool("dpkg-deb"))("apt installs from a flat repository", async () => {
    const to = site.out("apt");
    const folders = ["state/lists/partial", "cache/archives/partial", "etc", "package/DEBIAN"];
    for (const folder of folders) mkdirSync(join(to, folder), { recursive: true });
    chmodSync(join(to, "package"), 0o755);
    const control = "Package: example\nVersion: 1:2.0~a+b\nArchitecture: all\nMaintainer: x <x@x>\nDescription: x\n";
    writeFileSync(join(to, "package/DEBIAN/control"), control);
    mkdirSync(join(site.root, "apt"));
    const name = "example_1%3a2.0~a+b_all.deb";
    const deb = join(site.root, "apt", name);
    expect(await run(["dpkg-deb", "--root-owner-group", "-b", join(to, "package"), deb])).toMatchObject({
      exitCode: 0,
    });
    const bytes = readFileSync(deb);
    const sha256 = new Bun.CryptoHasher("sha256").update(bytes).digest("hex");
    const about = `Filename: ./${name}\nSize: ${bytes.length}\nSHA256: ${sha256}\n`;
    writeFileSync(join(site.root, "apt/Packages"), `${control}${about}`);
    writeFileSync(join(to, "etc/sources.list"), `deb [trusted=yes] ${site.url}/apt ./\n`);
    writeFileSync(join(to, "state/status"), "");
    const options = {
      "Dir::State": join(to, "state"),
      "Dir::State::status": join(to, "state/status"),
      "Dir::Cache": join(to, "cache"),
      "Dir::Etc": join(to, "etc"),
      "APT::Sandbox::User": "",
      "Acquire::http::Proxy": "false",
    };
    const apt = (...args: string[]) =>
      run(["apt-get", "-q", ...Object.entries(options).flatMap(([key, value]) => ["-o", `${key}=${value}`]), ...args], {
        cwd: to,
      });
    expect(await apt("update")).toMatchObject({ exitCode: 0, stderr: "" });
    expect(await apt("download", "example")).toMatchObject({ exitCode: 0 });
    const got = readdirSync(to).find((file) => file.endsWith(".deb")) ?? "";
    expect(readFileSync(join(to, got)).equals(bytes)).toBeTrue();
  });

  test.concurrent.if(hasTool("haproxy"))("HAProxy's default health check finds it up", async () => {
    const port = await freePort();
    const file = join(site.out("haproxy"), "cfg");
    const socket = join(site.out("haproxy"), "s");
    writeFileSync(
      file,
      `global
  maxconn 100
  stats socket ${socket}
defaults
  mode http
  timeout connect 20s
  timeout client 20s
  timeout server 20s
frontend front
  bind 127.0.0.1:${port}
  default_backend origin
backend origin
  option httpchk
  default-server inter 50ms fall 1 rise 1
  server origin ${new URL(site.url).host} check
`,
    );
    await using _ = await start(["haproxy", "-db", "-V", "-f", file], /Using epoll\(\)/);
    const code = `
import socket, sys
s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.sendall(b"show stat\\n")
print(s.makefile().read())`;
    let stat = "";
    const ask = async () => {
      const rows = (await run(["python3", "-c", code, socket])).stdout.split("\n").map((line) => line.split(","));
      const [names = []] = rows;
      const row = rows.find((cells) => cells[0] === "origin" && cells[1] === "origin") ?? [];
      stat = `${row[names.indexOf("status")]} ${row[names.indexOf("check_status")]}`;
    };
    while (!/^(UP|DOWN) L/.test(stat)) await ask(); // until it has been checked
    expect(stat).toBe("UP L7OK");
    expect((await run(["curl", "-s", `http://127.0.0.1:${port}/odd/sub%3Afolder/deep`])).stdout).toBe("deep");
  });

  test.concurrent.if(hasTool("nginx"))(
    "behind a prefix of nginx, redirects and links lead to where they should",
    async () => {
      const location = `location /files/ { proxy_pass ${site.url}/; proxy_redirect off; }`;
      await using nginx = await startNginx(site.root, location);
      const to = site.out("prefix");
      const { stdout } = await run(["curl", "-sL", "-w", "%{url_effective}", `${nginx.url}/files/odd/sub%3Afolder`]);
      expect(stdout).toContain('<a href="deep">');
      expect(stdout).toEndWith(`${nginx.url}/files/odd/sub%3Afolder/`);
      const argv = ["wget", "-q", "-r", "-np", "-nH", "--cut-dirs=2", "-R", "index.html*", `${nginx.url}/files/odd/`];
      expect(await run(argv, { cwd: to, env: { LC_ALL: "C.UTF-8" } })).toMatchObject({ exitCode: 0 });
      expectMirror(to);
    },
  );
});
