/** The tutorial's server, translated line by line. It is meant to fail: docs/lab.md shows how. Linux only. */
import { decode, encode, PORT, Socket } from "./blocking-socket.ts";

// create the socket
const serverSocket = new Socket();

// bind address and port
const serverAddress = ["localhost", PORT] as const;
serverSocket.bind(serverAddress);

// listen for connections
serverSocket.listen(1);

while (true) {
  // accept a connection
  const clientSocket = serverSocket.accept();

  // receive the request                                       ① one receive is taken for one request
  const request = decode(clientSocket.recv(1024)); //          ② a silent client stops the server here
  console.log(request); //                                     ③ control characters reach the terminal

  // process the request                                       ④ always 200, and no Content-Length
  const response = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nHello, World!";
  clientSocket.sendall(encode(response));

  // close the connection                                      ⑤ unread bytes make this a reset
  clientSocket.close();
}
