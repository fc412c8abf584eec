/** The tutorial's improved client with content to send: 10 MB. It is meant to fail: docs/lab.md shows how. Linux only. */
import { decode, encode, PORT, Socket, SocketError } from "./blocking-socket.ts";

const content = "x".repeat(10_000_000);
const request = `POST /data HTTP/1.1\r\nHost: localhost\r\nContent-Length: ${content.length}\r\n\r\n${content}`;
const clientSocket = new Socket();

try {
  clientSocket.connect(["localhost", PORT]);
  clientSocket.sendall(encode(request)); //       the answer may be there before all of this is sent …
  console.log(decode(clientSocket.recv(1024))); // … and is looked for only here
} catch (error) {
  if (!(error instanceof SocketError)) throw error;
  console.log("Error:", error.message);
} finally {
  clientSocket.close();
}
