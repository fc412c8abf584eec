/**
 * Writes key.pem, and cert.pem, which signs itself, for localhost: X.509 (RFC 5280) by hand, since Bun has no built-in
 * for it and `openssl` is not everywhere. For the lab only. It replaces files of these names in this folder.
 *
 *     bun docs/lab/certificate.ts
 */
import { generateKeyPairSync, randomBytes, sign } from "node:crypto";

/** DER: tag, length, content. */
function der(tag: number, ...contents: Uint8Array[]): Buffer {
  const content = Buffer.concat(contents);
  const { length } = content;
  const head = length < 128 ? [length] : length < 256 ? [0x81, length] : [0x82, length >> 8, length & 0xff];
  return Buffer.concat([Buffer.of(tag, ...head), content]);
}
const sequence = (...contents: Uint8Array[]) => der(0x30, ...contents);
const oid = (hex: string) => der(0x06, Buffer.from(hex, "hex"));
const time = (date: Date) => der(0x18, Buffer.from(`${date.toISOString().replace(/[-:T]|\.\d+/g, "")}`));

const { publicKey, privateKey } = generateKeyPairSync("ec", { namedCurve: "P-256" });
const ecdsaWithSha256 = sequence(oid("2a8648ce3d040302"));
const commonName = sequence(der(0x31, sequence(oid("550403"), der(0x0c, Buffer.from("localhost")))));
const now = Date.now();
const validity = sequence(time(new Date(now - 3_600_000)), time(new Date(now + 30 * 86_400_000)));
const names = sequence(der(0x82, Buffer.from("localhost")), der(0x87, Buffer.of(127, 0, 0, 1)));
const extensions = sequence(sequence(oid("551d11"), der(0x04, names))); // subjectAltName

const certificate = sequence(
  der(0xa0, der(0x02, Buffer.of(2))), // version 3
  der(0x02, Buffer.of(1, ...randomBytes(8))), // serial number
  ecdsaWithSha256,
  commonName, // the issuer: itself
  validity,
  commonName,
  publicKey.export({ type: "spki", format: "der" }),
  der(0xa3, extensions),
);
const signature = sign("sha256", certificate, privateKey);
const signed = sequence(certificate, ecdsaWithSha256, der(0x03, Buffer.of(0), signature));

const lines = signed.toString("base64").replace(/.{64}/g, "$&\n");
await Bun.write("cert.pem", `-----BEGIN CERTIFICATE-----\n${lines}\n-----END CERTIFICATE-----\n`);
await Bun.write("key.pem", privateKey.export({ type: "pkcs8", format: "pem" }), { mode: 0o600 });
