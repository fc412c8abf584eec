/** An origin that follows a script, for tests of what the client does after a failure. */
import { createHash } from "node:crypto";

export const CONTENT: Buffer = Buffer.from(Array.from({ length: 5000 }, (_, i) => `${i}\n`).join(""));
/** Another version, of the same length. */
export const OTHER: Buffer = Buffer.from(CONTENT.toString().replaceAll("\n", ";"));
/** So much of the content comes before an answer breaks off. */
export const HALF = 9000;
export const sha256 = (content: Buffer) => createHash("sha256").update(content).digest("hex");
export const reprDigest = (content: Buffer) =>
  `Repr-Digest: sha-256=:${Buffer.from(sha256(content), "hex").toString("base64")}:\r\n`;

/** What a connection gets: bytes, after a pause the rest of them, and then its end. */
export interface Answer {
  readonly bytes: string | Buffer;
  readonly pause?: () => unknown;
  readonly rest?: string | Buffer | Answer;
  readonly end?: "fin" | "reset" | "stall";
}
export type Script = (request: string) => Answer;

/** A connection: whether the client has left, and what to call when that or room to send changes. */
interface Line {
  isGone: boolean;
  wake: () => void;
}

async function send(socket: Bun.Socket<Line>, piece: string | Buffer): Promise<void> {
  const bytes = Buffer.from(piece);
  for (let sent = 0; sent < bytes.length && !socket.data.isGone;) {
    const written = socket.write(bytes, sent, bytes.length - sent);
    if (written < 0) return;
    sent += written;
    if (sent < bytes.length) await new Promise<void>((resolve) => (socket.data.wake = resolve));
  }
}

async function play(socket: Bun.Socket<Line>, { bytes, pause, rest, end }: Answer): Promise<void> {
  await send(socket, bytes);
  await pause?.();
  if (typeof rest === "object" && "bytes" in rest) return play(socket, rest);
  if (rest !== undefined) await send(socket, rest);
  if (end === "reset") setTimeout(() => socket.terminate(), 50);
  else if (end !== "stall") socket.shutdown();
}

/** Request heads as they came, with the answers of the script, one a connection; the last one goes on. */
export function scripted(answers: Script[], { port = 0, tls = false as Bun.TLSOptions | false } = {}) {
  const requests: string[] = [];
  /** When each request came, in milliseconds. */
  const times: number[] = [];
  let connections = 0;
  /** From here on there are other answers, and no request has come yet. */
  const answerAnew = (...others: Script[]) => {
    requests.length = 0;
    answers = others;
  };
  const listener = Bun.listen<Line>({
    hostname: "127.0.0.1",
    port,
    tls,
    allowHalfOpen: true,
    socket: {
      open(socket) {
        connections++;
        socket.data = { isGone: false, wake() {} };
      },
      data(socket, bytes) {
        times.push(performance.now());
        requests.push(bytes.toString("latin1"));
        const answer = answers[Math.min(requests.length, answers.length) - 1]?.(requests.at(-1) ?? "");
        void play(socket, answer ?? { bytes: "" });
      },
      drain: (socket) => socket.data.wake(),
      end: (socket) => void socket.end(),
      close(socket) {
        socket.data.isGone = true;
        socket.data.wake();
      },
      error() {}, // a client that is killed resets its connection
    },
  });
  const dispose = () => listener.stop(true);
  const url = `http${tls ? "s" : ""}://127.0.0.1:${listener.port}/file`;
  return {
    requests,
    times,
    /** Those that brought no request are counted too. */
    connections: () => connections,
    port: listener.port,
    url,
    answerAnew,
    [Symbol.dispose]: dispose,
  };
}

/** The first byte that a request asks for; undefined where it asks for the whole. */
export function rangeOf(request = ""): number | undefined {
  const first = /\r\nRange: bytes=(\d+)-\r\n/.exec(request)?.[1];
  return first === undefined ? undefined : Number(first);
}

/** The whole, or what Range asks for, as a server should; `cut` bytes of it at the most. */
export const serving =
  ({
    etag = '"a"',
    /** Sent as it is, with a Date that it is older than. */
    lastModified = "",
    date = new Date().toUTCString(),
    cut = Number.POSITIVE_INFINITY,
    end = "fin" as NonNullable<Answer["end"]>,
    content = CONTENT,
    fields = "",
  } = {}): Script =>
  (request) => {
    const condition = /\r\nIf-Range: (.*)\r\n/.exec(request)?.[1];
    const isSame = condition === undefined || condition === etag || condition === lastModified;
    const from = isSame ? (rangeOf(request) ?? 0) : 0;
    if (from > 0 && from >= content.length)
      return {
        bytes: `HTTP/1.1 416 No\r\nContent-Range: bytes */${content.length}\r\nContent-Length: 0\r\n\r\n`,
      };
    const status =
      from > 0
        ? `206 Partial Content\r\nContent-Range: bytes ${from}-${content.length - 1}/${content.length}`
        : "200 OK";
    const tag = etag === "" ? "" : `ETag: ${etag}\r\n`;
    const dates = lastModified === "" ? "" : `Date: ${date}\r\nLast-Modified: ${lastModified}\r\n`;
    const text = `HTTP/1.1 ${status}\r\n${tag}${dates}${fields}Content-Length: ${content.length - from}\r\n\r\n`;
    const part = content.subarray(from, from + Math.min(cut, content.length));
    return { bytes: Buffer.concat([Buffer.from(text), part]), end };
  };

export const raw =
  (text: string | Buffer, end: NonNullable<Answer["end"]> = "fin"): Script =>
  () => ({ bytes: text, end });

/** A response of these fields, with this content and its length. */
export const response = (status: string, content: string | Buffer = "", ...fields: string[]): Script =>
  raw(
    Buffer.concat([
      Buffer.from([`HTTP/1.1 ${status}`, ...fields, `Content-Length: ${content.length}`, "\r\n"].join("\r\n")),
      Buffer.from(content),
    ]),
  );

/** Stops inside the content of an answer until `pause` has ended, then sends the rest. */
export const pausing =
  (script: Script, contentBytes: number, pause: () => unknown): Script =>
  (request) => {
    const { bytes, ...answer } = script(request);
    const all = Buffer.from(bytes);
    const at = all.indexOf("\r\n\r\n") + 4 + contentBytes;
    return { ...answer, bytes: all.subarray(0, at), pause, rest: all.subarray(at) };
  };
