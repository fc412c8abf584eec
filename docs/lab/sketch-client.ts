/** The tutorial's client, translated line by line. It is meant to fail: docs/lab.md shows how. Linux only. */
import { decode, encode, PORT, Socket } from "./blocking-socket.ts";

// create the socket
const clientSocket = new Socket();

// connect to the server                                       ① no timeout, here or below
const serverAddress = ["localhost", PORT] as const;
clientSocket.connect(serverAddress);

// send the request                                            ② Host lacks the port
const request = "GET /data HTTP/1.1\r\nHost: localhost\r\n\r\n";
clientSocket.sendall(encode(request));

// receive the response                                        ③ one receive is taken for one response
const response = decode(clientSocket.recv(1024)); //           ④ a character cut in two throws
console.log(response);

// close the connection                                        ⑤ not reached if anything above throws
clientSocket.close();
