/**
 * Reads the same bytes twice, as two programs would that each believe one of two contradicting fields: a proxy that
 * goes by Content-Length, and a server behind it that goes by Transfer-Encoding. Prints the requests that each sees.
 *
 *     bun docs/lab/two-readers.ts "POST / HTTP/1.1\r\nContent-Length: 30\r\nTransfer-Encoding: chunked\r\n\r\n…"
 */
const escapes: Readonly<Record<string, string>> = { r: "\r", n: "\n" };
const stream = (process.argv[2] ?? "").replace(/\\([rn])/g, (_, letter: string) => escapes[letter] ?? letter);

/** How long is the content that begins at `from`, for a reader that goes by the length? */
const byLength = (head: string) => Number(/^Content-Length: (\d+)\r$/im.exec(head)?.[1] ?? 0);

/** And for a reader that goes by the chunks? */
function byChunks(head: string, from: number): number {
  if (!/^Transfer-Encoding: chunked\r$/im.test(head)) return byLength(head);
  const chunks = /^(?:[1-9a-f][0-9a-f]*\r\n.*?\r\n)*?0\r\n\r\n/is.exec(stream.slice(from))?.[0] ?? "";
  return chunks.length;
}

/** The request-lines that a reader finds in the stream. */
function* requestLines(lengthOf: (head: string, from: number) => number): Generator<string> {
  for (let at = 0; at < stream.length;) {
    const headEnd = stream.indexOf("\r\n\r\n", at) + 4;
    if (headEnd < 4) return yield `(waits for the rest of ${JSON.stringify(stream.slice(at))})`;
    const head = stream.slice(at, headEnd);
    yield head.slice(0, head.indexOf("\r\n"));
    at = headEnd + lengthOf(head, headEnd);
  }
}

for (const [name, lengthOf] of [["by Content-Length", byLength] as const, ["by Transfer-Encoding", byChunks] as const])
  console.log(`${name}: ${[...requestLines(lengthOf)].join(", then ")}`);
