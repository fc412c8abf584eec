/** A TCP proxy that passes bytes through and, where it is told to, breaks what comes from the server. */

/** What happens to one connection on its way from the server to the client. */
export interface Plan {
  /** After so many bytes of the server's it breaks; without it never. */
  readonly bytes?: number;
  /** How it breaks: in order though too early, with a reset, or with silence until the client has enough of it. */
  readonly end?: "close" | "reset" | "stall";
  /** So many bytes at the most are passed on in one turn of the event loop, so that they come in small parts. */
  readonly pieceBytes?: number;
  /** Changes the bytes that pass. The offset is that of the first of them within the connection. */
  readonly alter?: (bytes: Buffer, offset: number) => void;
}

/** One connection through the proxy: two sockets, and what the slower one has not taken yet. */
class Passage {
  /** What the client has sent, one character a byte. */
  request = "";
  /** Bytes of the server's that were passed on, or are about to be. */
  passed = 0;
  private readonly toClient: Buffer[] = [];
  private readonly toServer: Buffer[] = [];
  private server: Bun.Socket<undefined> | undefined;
  private serverHasEnded = false;
  private clientHasEnded = false;
  private isBroken = false;
  private isPumping = false;

  constructor(
    private readonly client: Bun.Socket<Passage | undefined>,
    private readonly plan: Plan,
  ) {}

  async connect(port: number): Promise<void> {
    const socket: Bun.SocketHandler<undefined> = {
      open: (server) => {
        this.server = server;
        this.pumpToServer();
        if (this.clientHasEnded) server.shutdown();
      },
      data: (_, bytes) => this.onServerData(bytes),
      drain: () => this.pumpToServer(),
      end: () => {
        this.serverHasEnded = true;
        this.pumpToClient();
      },
      close: (_, error) => {
        if (error !== undefined && !this.isBroken) this.client.terminate();
      },
    };
    await Bun.connect({ hostname: "127.0.0.1", port, allowHalfOpen: true, socket }).catch(() =>
      this.client.terminate(),
    );
  }

  onClientData(bytes: Buffer): void {
    this.request += bytes.toString("latin1");
    this.toServer.push(Buffer.from(bytes));
    this.pumpToServer();
  }

  onClientEnd(): void {
    this.clientHasEnded = true;
    this.server?.shutdown();
    if (this.serverHasEnded && this.toClient.length === 0) this.client.end();
  }

  /** The client has gone: nobody is left to ask for anything. */
  onClientClose(): void {
    this.isBroken = true;
    this.toClient.length = 0;
    this.server?.terminate();
  }

  private onServerData(bytes: Buffer): void {
    if (this.isBroken) return;
    const left = (this.plan.bytes ?? Number.POSITIVE_INFINITY) - this.passed;
    const taken = Buffer.from(bytes.subarray(0, Math.min(left, bytes.length)));
    this.plan.alter?.(taken, this.passed);
    this.passed += taken.length;
    this.toClient.push(taken);
    if (bytes.length >= left) {
      this.isBroken = true;
      this.server?.terminate();
    } else this.server?.pause();
    this.pumpToClient();
  }

  /** Passes on what the client takes; the server may send more when all of it is gone. */
  pumpToClient(): void {
    if (this.isPumping) return;
    for (let first = this.toClient[0]; first !== undefined; first = this.toClient[0]) {
      const length = Math.min(first.length, this.plan.pieceBytes ?? first.length);
      const written = length === 0 ? 0 : this.client.write(first, 0, length);
      if (written < 0) return;
      if (written === first.length) this.toClient.shift();
      else this.toClient[0] = first.subarray(written);
      if (written < length) return; // drain comes
      if (length < first.length) return this.pumpLater();
    }
    if (this.isBroken) return this.breakOff();
    if (!this.serverHasEnded) this.server?.resume();
    else if (this.clientHasEnded) this.client.end();
    else this.client.shutdown();
  }

  private pumpLater(): void {
    this.isPumping = true;
    setImmediate(() => {
      this.isPumping = false;
      this.pumpToClient();
    });
  }

  private breakOff(): void {
    if (this.plan.end === "reset") this.client.terminate();
    else if (this.plan.end !== "stall") this.client.end();
  }

  private pumpToServer(): void {
    if (this.server === undefined) return;
    for (let first = this.toServer[0]; first !== undefined; first = this.toServer[0]) {
      const written = this.server.write(first);
      if (written < 0) return;
      if (written < first.length) return void (this.toServer[0] = first.subarray(written));
      this.toServer.shift();
    }
  }
}

/**
 * Listens on a free port and passes each connection on to another port, as `decide` says.
 * @param decide gets the number of the connection, from 0
 */
export function startProxy(port: number, decide: (connection: number) => Plan) {
  const passages: Passage[] = [];
  const listener = Bun.listen<Passage | undefined>({
    hostname: "127.0.0.1",
    port: 0,
    allowHalfOpen: true,
    socket: {
      open(socket) {
        const passage = new Passage(socket, decide(passages.length));
        socket.data = passage;
        passages.push(passage);
        void passage.connect(port);
      },
      data: (socket, bytes) => socket.data?.onClientData(bytes),
      drain: (socket) => socket.data?.pumpToClient(),
      end: (socket) => socket.data?.onClientEnd(),
      close: (socket) => socket.data?.onClientClose(),
    },
  });
  /** The connections so far, in the order in which they came. */
  return { port: listener.port, passages, [Symbol.dispose]: () => listener.stop(true) };
}
