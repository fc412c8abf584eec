/** Node's own server, with the handler that its documentation starts with. */
import { createServer } from "node:http";

const server = createServer((_, response) => {
  response.writeHead(200, { "Content-Type": "text/plain; charset=utf-8" });
  response.end("Hello, World!");
});
server.listen(Number(process.argv[2]), "127.0.0.1", () => console.error("Listening on http://127.0.0.1"));
