/**
 * Reads the message vectors of test/vectors. A vector is a text file, named by its reason:
 *
 *     title: bare LF ends a field-line
 *     section: RFC 9112 §2.2
 *     outcome: 400 bare-lf
 *
 *     GET / HTTP/1.1\r\n
 *     Host: x\n
 *     \r\n
 *
 * After the first empty line comes the message. There, line breaks of the file mean nothing; bytes that cannot be
 * seen are written \r \n \t \0 \xNN, a backslash is \\, and \{TEXT*N} is TEXT written N times. All else is UTF-8.
 */
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";

export interface Vector {
  readonly name: string;
  readonly title: string;
  readonly section: string;
  readonly outcome: string;
  /** Further `key: value` lines, where a kind of vector has some. */
  readonly options: Readonly<Record<string, string>>;
  readonly message: Buffer;
}

const ESCAPES: Readonly<Record<string, string>> = { r: "\r", n: "\n", t: "\t", "0": "\0", "\\": "\\" };

/** The bytes that a message in visible form stands for. @throws Error at an unknown escape */
export function parseMessage(text: string): Buffer {
  const joined = text.replaceAll("\n", "");
  const pieces = joined.match(/\\\{.*?\*\d+\}|\\x[0-9a-fA-F]{2}|\\.|[^\\]+/gs) ?? [];
  return Buffer.concat(
    pieces.map((piece) => {
      if (!piece.startsWith("\\")) return Buffer.from(piece);
      const repeat = /^\\\{(.*)\*(\d+)\}$/s.exec(piece);
      if (repeat) return parseMessage((repeat[1] ?? "").repeat(Number(repeat[2])));
      if (piece.startsWith("\\x")) return Buffer.from([Number.parseInt(piece.slice(2), 16)]);
      const escaped = ESCAPES[piece.slice(1)];
      if (escaped === undefined) throw new Error(`unknown escape ${piece}`);
      return Buffer.from(escaped);
    }),
  );
}

/** Takes a vector file apart. @throws Error where a part is missing */
export function parseVector(name: string, text: string): Vector {
  const gap = text.indexOf("\n\n");
  const options = Object.fromEntries(
    text
      .slice(0, gap)
      .split("\n")
      .map((line) => /^(\w+): (.+)$/.exec(line)?.slice(1) ?? [line, ""]),
  ) as Record<string, string>; // Object.fromEntries knows no better
  const { title, section, outcome, ...rest } = options;
  if (gap < 0 || !title || !section || !outcome) throw new Error(`${name}: title, section or outcome is missing`);
  return { name, title, section, outcome, options: rest, message: parseMessage(text.slice(gap + 2)) };
}

/** All vectors of a kind, by name. */
export function readVectors(kind: "request" | "response"): Vector[] {
  const folder = join(import.meta.dir, "vectors", kind);
  const names = readdirSync(folder).filter((name) => name.endsWith(".txt"));
  return names.toSorted().map((name) => parseVector(name.slice(0, -4), readFileSync(join(folder, name), "utf8")));
}

/** The message as one piece, byte by byte, cut in two at every place. For long messages at some of them, seeded. */
export function* splits(message: Buffer, seed: number): Generator<Buffer[]> {
  yield [message];
  if (message.length > 4096) {
    let state = seed;
    for (let i = 0; i < 16; i++) {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
      const at = 1 + (state % (message.length - 1));
      yield [message.subarray(0, at), message.subarray(at)];
    }
    return;
  }
  yield Array.from(message, (_, i) => message.subarray(i, i + 1));
  for (let at = 1; at < message.length; at++) yield [message.subarray(0, at), message.subarray(at)];
}
