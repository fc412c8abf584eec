/** Bun's own server, with the fetch handler that its documentation starts with. */
const server = Bun.serve({
  hostname: "127.0.0.1",
  port: Number(process.argv[2]),
  fetch: () => new Response("Hello, World!"),
});
console.error(`Listening on ${server.url}`);
