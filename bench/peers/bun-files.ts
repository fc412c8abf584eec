/** Bun's own server with Bun.file, as its documentation serves files. No ".." is left in a URL; nothing else is checked. */
const [, , port, root] = process.argv;
Bun.serve({
  hostname: "127.0.0.1",
  port: Number(port),
  fetch: (request) => new Response(Bun.file(root + new URL(request.url).pathname)),
});
export {};
