/** The tutorial's improved client, translated line by line. It is meant to fail: docs/lab.md shows how. Linux only. */
import { decode, encode, PORT, Socket, SocketError } from "./blocking-socket.ts";

const serverAddress = ["localhost", PORT] as const;
const request = "GET /data HTTP/1.1\r\nHost: localhost\r\n\r\n";
const clientSocket = new Socket();

try {
  // connect to the server                                     ① no timeout, here or below
  clientSocket.connect(serverAddress);

  // send the request
  clientSocket.sendall(encode(request));

  // receive the response
  let response = ""; //                                        ② all of it in memory, whatever its size
  while (true) {
    const data = clientSocket.recv(1024);
    if (data.length === 0) break; //                           ③ the end of the connection is taken for the end
    response += decode(data); //                               ④ each piece is decoded by itself
  }
  console.log(response);
} catch (error) {
  if (!(error instanceof SocketError)) throw error;
  console.log("Error:", error.message); //                     ⑤ and the exit code is 0
} finally {
  // close the connection
  clientSocket.close();
}
