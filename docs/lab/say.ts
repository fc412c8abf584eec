/**
 * Says exactly these bytes on a TCP connection, at this pace, and prints each step with the milliseconds since the
 * connection began. It plays the odd peers of docs/lab.md: slow, silent, deaf, broken ones.
 *
 *     bun docs/lab/say.ts 8888 "GET /da" :wait=1000 "ta HTTP/1.1\r\nHost: x\r\n\r\n"     connects, and says that
 *     bun docs/lab/say.ts listen 8888 "HTTP/1.1 200 OK\r\n\r\nHello"                     answers each peer with that
 *
 * A piece is text, in which \r \n \t \\ \xNN are bytes and \{TEXT*N} is TEXT N times. Between the pieces:
 *     :wait=MS    waits               :times=N   says the piece before it N times, in one go
 *     :each=MS    says the piece before it byte by byte, with so many ms between two
 *     :deaf       stops reading       :hear      reads again
 *     :rst        resets              :stay      keeps the connection until the peer closes it
 * At the end it closes: one that listens at once, one that has connected when nothing has come for a second. `--tls`
 * says it all over TLS, with cert.pem and key.pem in this folder (certificate.ts makes them).
 */

type Step =
  | { readonly kind: "send"; readonly bytes: Buffer; readonly pauseMs: number | undefined }
  | { readonly kind: "wait"; readonly ms: number }
  | { readonly kind: "deaf" }
  | { readonly kind: "hear" }
  | { readonly kind: "rst" }
  | { readonly kind: "stay" };

const SILENCE_MS = 1000;
/** How many bytes a line shows: of what is sent, which the command has anyway, and of what comes. */
const [SHOWN_SENT_MAX, SHOWN_RECEIVED_MAX] = [50, 200];

/** The bytes that a piece of text stands for. */
function parsePiece(text: string): Buffer {
  const repeated = text.replace(/\\\{(.*?)\*(\d+)\}/g, (_, piece: string, times: string) =>
    piece.repeat(Number(times)),
  );
  const bytes = Buffer.from(repeated).toString("latin1"); // one character a byte
  const escapes: Readonly<Record<string, string>> = { r: "\r", n: "\n", t: "\t", "\\": "\\" };
  const plain = bytes.replace(/\\(?:([rnt\\])|x([0-9a-f]{2}))/gi, (_, letter: string | undefined, hex = "") =>
    letter === undefined ? String.fromCharCode(parseInt(hex, 16)) : (escapes[letter] ?? letter),
  );
  return Buffer.from(plain, "latin1");
}

/** @throws Error that names the argument that is none */
function parseSteps(args: readonly string[]): Step[] {
  const steps: Step[] = [];
  for (const arg of args) {
    const [, name = "", number = ""] = /^:(wait|times|each|deaf|hear|rst|stay)(?:=(\d+))?$/.exec(arg) ?? [];
    const last = steps.at(-1);
    if (name === "") steps.push({ kind: "send", bytes: parsePiece(arg), pauseMs: undefined });
    else if (name === "deaf" || name === "hear" || name === "rst" || name === "stay") steps.push({ kind: name });
    else if (number === "") throw new Error(`${arg} needs a number`);
    else if (name === "wait") steps.push({ kind: "wait", ms: Number(number) });
    else if (last?.kind !== "send") throw new Error(`${arg} needs a piece before it`);
    else if (name === "each") steps[steps.length - 1] = { ...last, pauseMs: Number(number) };
    else steps[steps.length - 1] = { ...last, bytes: Buffer.concat(Array(Number(number)).fill(last.bytes)) };
  }
  return steps;
}

/** The first bytes, readable: `"GET / HTTP/1.1\r\n"…` */
function quote(bytes: Uint8Array, max: number): string {
  const escapes: Readonly<Record<string, string>> = { "\r": "\\r", "\n": "\\n", "\t": "\\t", '"': '\\"', "\\": "\\\\" };
  const text = Buffer.from(bytes.subarray(0, max)).toString("latin1");
  const shown = text.replace(
    /["\\]|[^ -~]/g,
    (c) => escapes[c] ?? `\\x${c.charCodeAt(0).toString(16).padStart(2, "0")}`,
  );
  return `"${shown}"${bytes.length > max ? "…" : ""}`;
}

/** One connection, and the part that is played on it. */
class Part {
  private readonly began = performance.now();
  private hasReceived = false;
  private isClosed = false;
  private wake = () => {};

  constructor(
    private readonly socket: Bun.Socket<Part | undefined>,
    private readonly number: number,
    private readonly answers: boolean,
  ) {}

  private tell(event: string, details = ""): void {
    const ms = (performance.now() - this.began).toFixed(1).padStart(8);
    console.log(`#${this.number} ${ms} ms  ${event.padEnd(8)} ${details}`.trimEnd());
  }

  onData(bytes: Buffer): void {
    this.tell("receive", `${bytes.length} B  ${quote(bytes, this.answers ? SHOWN_SENT_MAX : SHOWN_RECEIVED_MAX)}`);
    this.hasReceived = true;
    this.wake();
  }

  onEnd(): void {
    this.tell("FIN", "received");
    this.socket.end(); // nothing is left to say: our FIN
  }

  onClose(error: Error | undefined): void {
    if (error !== undefined && !this.isClosed) this.tell("reset", "received");
    this.isClosed = true;
    this.wake();
  }

  onDrain(): void {
    this.wake();
  }

  /** Waits until something happens, or so long. @returns whether something has happened */
  private wait(ms = 2 ** 31 - 1): Promise<boolean> {
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, ms, false);
      this.wake = () => {
        clearTimeout(timer);
        resolve(true);
      };
    });
  }

  private async send(bytes: Buffer, pauseMs: number | undefined): Promise<void> {
    let sent = 0;
    while (!this.isClosed && sent < bytes.length) {
      const length = pauseMs === undefined ? bytes.length - sent : 1;
      const taken = this.socket.write(bytes, sent, length);
      if (taken < 0) break; // the connection is lost
      sent += taken;
      if (sent === bytes.length) break;
      if (pauseMs !== undefined) await Bun.sleep(pauseMs);
      else if (!(await this.wait(2 * SILENCE_MS))) break; // the buffers are full, here and there
    }
    this.tell("send", `${sent} of ${bytes.length} B  ${quote(bytes, SHOWN_SENT_MAX)}`);
    if (sent < bytes.length && !this.isClosed) this.tell("stuck", "the peer takes no more");
  }

  private async take(step: Step): Promise<void> {
    switch (step.kind) {
      case "send":
        return this.send(step.bytes, step.pauseMs);
      case "wait":
        return Bun.sleep(step.ms);
      case "deaf":
        return void this.socket.pause();
      case "hear":
        return void this.socket.resume();
      case "rst":
        this.tell("reset", "sent");
        return this.socket.terminate();
      case "stay":
        while (!this.isClosed) await this.wait();
    }
  }

  async play(steps: readonly Step[]): Promise<void> {
    this.tell("connect");
    while (this.answers && !this.hasReceived && !this.isClosed) await this.wait();
    for (const step of steps) if (!this.isClosed) await this.take(step);
    if (!this.answers) while (!this.isClosed && (await this.wait(SILENCE_MS)));
    if (this.isClosed) return;
    this.tell("close", "FIN sent");
    this.isClosed = true;
    this.socket.end();
    if (!this.answers) this.socket.unref(); // the process may end
  }
}

async function main([...args]: string[]): Promise<void> {
  const usesTls = args.includes("--tls");
  const [first = "", ...rest] = args.filter((arg) => arg !== "--tls");
  const listens = first === "listen";
  const [port = "", ...pieces] = listens ? rest : [first, ...rest];
  if (!/^\d+$/.test(port)) throw new Error("the first argument is a port, or listen and a port");
  const steps = parseSteps(pieces);

  let connections = 0;
  const socket: Bun.SocketHandler<Part | undefined> = {
    open(opened) {
      opened.data = new Part(opened, ++connections, listens);
      void opened.data.play(steps);
    },
    data: ({ data }, bytes) => data?.onData(bytes),
    end: ({ data }) => data?.onEnd(),
    drain: ({ data }) => data?.onDrain(),
    close: ({ data }, error) => data?.onClose(error),
  };
  // Not "localhost": Bun tries both its addresses at once, and the server sees two connections.
  const address = { hostname: "127.0.0.1", port: Number(port), allowHalfOpen: true, data: undefined, socket };
  if (!listens) await Bun.connect({ ...address, tls: usesTls && { rejectUnauthorized: false } });
  else if (!usesTls) Bun.listen(address);
  else Bun.listen({ ...address, tls: { cert: Bun.file("cert.pem"), key: Bun.file("key.pem") } });
}

if (import.meta.main)
  main(process.argv.slice(2)).catch((error: Error) => {
    console.error(`Error: ${error.message}`);
    process.exit(2);
  });
