/**
 * Draws figures.svg, the six figures of the README, from what `bun run bench --write` has measured:
 *
 *     bun docs/figures.ts
 *
 * Each is a median divided by that of the peer. A time is turned round, so that more is better everywhere.
 */
import { join } from "node:path";
import { median, readResults, REFERENCES, type Subject } from "../bench/results.ts";

const FIGURES: readonly (readonly [subject: Subject, workload: string, ours: string, title: string])[] = [
  ["server", "plain", "server.ts", "a text, requests/s"],
  ["server", "16 pipelined", "server.ts", "16 requests at once, requests/s"],
  ["files", "2 GiB to one reader", "server.ts --root", "a file of 2 GiB, GiB/s"],
  ["files", "1 KiB, 10,000 different files", "server.ts --root", "10,000 files of 1 KiB, requests/s"],
  ["client", "2 GiB to /dev/null", "client-robust", "a download of 2 GiB, speed"],
  ["client", "13 bytes, start to exit", "client-robust", "13 bytes from start to exit, speed"],
];

const [WIDTH, ROW, TOP, LEFT, UNIT] = [720, 30, 44, 260, 130];
const BAR_MAX = WIDTH - LEFT - 140;

const STYLE = `
  svg { --paper: #fffdf9; --ink: #21252b; --soft: #646b75; --ours: #d9480f; --line: #8b9099; }
  @media (prefers-color-scheme: dark) { svg { --paper: #14171c; --ink: #e8e6e1; --soft: #9aa2ad; --ours: #ff8a4c; } }
  text { font: 14px system-ui, sans-serif; fill: var(--ink); paint-order: stroke; stroke: var(--paper); stroke-width: 5px; } .soft { fill: var(--soft); } .end { text-anchor: end; }`;

export function drawFigures(): string {
  const results = readResults();
  const rows = FIGURES.map(([subject, name, ours, title], index) => {
    const workload = results[subject]?.workloads.find((workload) => workload.name === name);
    const row = workload?.rows.find(({ peer }) => peer === ours);
    if (row === undefined) throw new Error(`bench/results.json has no ${ours} in ${name}`);
    const ratio = subject === "client" ? 1 / median(row.main) : median(row.main);
    const [y, length] = [TOP + index * ROW, Math.min(BAR_MAX, ratio * UNIT)];
    const cut = length < ratio * UNIT ? " →" : "";
    const bar = `<rect x="${LEFT}" y="${y + 2}" width="${length.toFixed(1)}" height="18" fill="var(--ours)"/>`;
    const label = `<text x="${LEFT - 12}" y="${y + 15}" class="end">${title}</text>
<text x="${(LEFT + length + 8).toFixed(1)}" y="${y + 15}">${ratio.toFixed(2)} × ${REFERENCES[subject]}${cut}</text>`;
    return { bar, label };
  });
  const height = TOP + FIGURES.length * ROW + 12;
  const line = LEFT + UNIT;
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDTH} ${height}" width="${WIDTH}" role="img" aria-label="Six figures beside nginx and curl: longer is better">
<style>${STYLE}
</style>
<rect width="${WIDTH}" height="${height}" rx="8" fill="var(--paper)"/>
<text x="${line}" y="26" class="soft" text-anchor="middle">nginx, curl = 1</text>
${rows.map(({ bar }) => bar).join("\n")}
<path d="M${line} 34V${height - 10}" stroke="var(--line)" stroke-dasharray="3 3"/>
${rows.map(({ label }) => label).join("\n")}
</svg>
`;
}

if (import.meta.main) await Bun.write(join(import.meta.dir, "figures.svg"), drawFigures());
