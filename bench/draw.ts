/**
 * results.svg: for each workload a row a program, with two bars that start at the line of the reference: the main
 * figure, and CPU. To the right is better in both, whichever of more and less that is; the scale is logarithmic, so
 * that twice and half are as far from the line. Plain SVG, light and dark, and with larger letters on a phone.
 */
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { formatRatio } from "./report.ts";
import {
  isLessBetter,
  REFERENCES,
  type Results,
  type Row,
  type Subject,
  type SubjectResult,
  SUBJECTS,
  median,
} from "./results.ts";

const WIDTH = 800;
const MARGIN = 24;
const ROW = 20;
const BAR = 10;
/** For each of the two columns: where its numbers end, and where its bars may be. */
const COLUMNS = { main: { number: 248, from: 260, to: 488 }, cpu: { number: 540, from: 552, to: 776 } } as const;
type Column = keyof typeof COLUMNS;

const TITLES: Readonly<Record<Subject, { title: string; note: string; main: string }>> = {
  server: { title: "server.ts", note: "beside other servers of a 13-byte text", main: "requests/s" },
  client: { title: "client-robust", note: "beside other clients, from nginx", main: "time" },
  files: { title: "server.ts --root", note: "beside other servers of files", main: "requests/s, GiB/s" },
};

const STYLE = `
  svg { --paper: #fffdf9; --ink: #21252b; --soft: #646b75; --line: #e6e2da; --one: #8b9099;
        --ours: #d9480f; --peer: #9aa5b4; --floor: #cfd5dd; --round: #21252b; }
  @media (prefers-color-scheme: dark) {
    svg { --paper: #14171c; --ink: #e8e6e1; --soft: #9aa2ad; --line: #2a2f37; --one: #6d7581;
          --ours: #ff8a4c; --peer: #6b7a8e; --floor: #434e5c; --round: #f4f1ea; }
  }
  text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; fill: var(--ink); }
  .headline { font-size: 22px; font-weight: 650; }
  .title { font-size: 17px; font-weight: 650; }
  .workload { font-weight: 600; paint-order: stroke; stroke: var(--paper); stroke-width: 5px; }
  .soft, .tick { fill: var(--soft); }
  .tick { font-size: 11px; text-anchor: middle; }
  .number { text-anchor: end; font-variant-numeric: tabular-nums; }
  .ours { font-weight: 700; fill: var(--ours); }
  .column { font-weight: 600; }
  .better { fill: var(--soft); text-anchor: end; }
  rect.ours { fill: var(--ours); } rect.peer { fill: var(--peer); } rect.floor { fill: var(--floor); }
  .grid { stroke: var(--line); } .one { stroke: var(--one); stroke-width: 1.5; }
  .rounds { stroke: var(--round); stroke-width: 1; stroke-opacity: .45; }
  .rule { stroke: var(--line); }
  @media (max-width: 560px) {
    text { font-size: 18px; } .headline { font-size: 30px; } .title { font-size: 24px; } .tick { font-size: 15px; }
    .wide { display: none; }
  }`;

const escape = (text: string) => text.replace(/[&<>"]/g, (character) => `&#${character.charCodeAt(0)};`);
const round = (value: number) => String(Math.round(value * 10) / 10);
const text = (x: number, y: number, name: string, content: string) =>
  `<text x="${round(x)}" y="${round(y)}" class="${name}">${escape(content)}</text>`;
const vertical = (x: number, from: number, to: number) => `M${round(x)} ${round(from)}V${round(to)}`;

/** Where ratios are in a column: powers of two from `low` to `high`. */
interface Scale {
  readonly low: number;
  readonly high: number;
  /** What is beyond the scale is at its end. */
  readonly x: (ratio: number) => number;
}

/** Room for all medians, and for something on both sides of 1. */
function makeScale(rows: readonly Row[], column: Column, isReversed: boolean): Scale {
  const logs = rows.map((row) => Math.log2(median(row[column]))).filter(Number.isFinite);
  const low = Math.floor(Math.min(-1, ...logs) - 0.15);
  const high = Math.ceil(Math.max(1, ...logs) + 0.15);
  const { from, to } = COLUMNS[column];
  const x = (ratio: number) => {
    const part = (Math.min(high, Math.max(low, Math.log2(ratio))) - low) / (high - low);
    return from + (to - from) * (isReversed ? 1 - part : part);
  };
  return { low, high, x };
}

const FRACTIONS: Readonly<Record<number, string>> = { [-1]: "½", [-2]: "¼", [-3]: "⅛" };
const tickName = (log: number) => (log >= 0 ? String(2 ** log) : (FRACTIONS[log] ?? `1/${2 ** -log}`));

/** The whole powers of two that have room for a name. */
function ticksOf({ low, high }: Scale): number[] {
  const step = high - low > 6 ? 2 : 1;
  return Array.from({ length: high - low + 1 }, (_, i) => low + i).filter((log) => log % step === 0);
}

function drawAxis(scale: Scale, top: number, bottom: number): string {
  const ticks = ticksOf(scale);
  const lines = ticks.filter((log) => log !== 0).map((log) => vertical(scale.x(2 ** log), top, bottom));
  const names = ticks.map((log) => text(scale.x(2 ** log), top - 6, "tick", tickName(log)));
  return `<path class="grid" d="${lines.join("")}"/><path class="one" d="${vertical(scale.x(1), top, bottom)}"/>${names.join("")}`;
}

/** A number, a bar from the line of the reference, and a stroke for each round. */
function drawValue({ role, ...row }: Row, column: Column, scale: Scale, y: number): string {
  const values = row[column];
  const middle = median(values);
  const number = text(COLUMNS[column].number, y + 4.5, `number ${role}`, formatRatio(middle));
  if (!(middle > 0)) return number;
  const [one, end] = [scale.x(1), scale.x(middle)];
  const [x, width] = [Math.min(one, end), Math.abs(end - one)];
  const bar = `<rect class="${role}" x="${round(x)}" y="${round(y - BAR / 2)}" width="${round(width)}" height="${BAR}"/>`;
  const strokes = values.filter((value) => value > 0).map((value) => vertical(scale.x(value), y - 3, y + 3));
  return `${number}${bar}<path class="rounds" d="${strokes.join("")}"/>`;
}

/** A subject from `top` on; returns where it ends. */
function drawSubject(
  subject: Subject,
  { workloads, missing }: SubjectResult,
  top: number,
): [svg: string, bottom: number] {
  const { title, note, main } = TITLES[subject];
  const reference = REFERENCES[subject];
  const rows = workloads.flatMap((workload) => workload.rows);
  const scales = {
    main: makeScale(rows, "main", isLessBetter(subject)),
    cpu: makeScale(rows, "cpu", true), // less is better
  };
  const parts = [
    `<path class="rule" d="M${MARGIN} ${top}H${WIDTH - MARGIN}"/>`,
    text(MARGIN, top + 32, "title", title),
    text(MARGIN, top + 54, "soft wide", note),
  ];
  for (const column of ["main", "cpu"] as const) {
    const { from, to } = COLUMNS[column];
    const direction = column === "cpu" || isLessBetter(subject) ? "less is better →" : "more is better →";
    parts.push(text(from, top + 32, "column", `${column === "cpu" ? "CPU" : main} ÷ ${reference}`));
    parts.push(text(to, top + 54, "better", direction));
  }
  let y = top + 92;
  const axesTop = y;
  for (const workload of workloads) {
    parts.push(text(MARGIN, y + 6, "workload", workload.name));
    y += 26;
    for (const row of workload.rows) {
      parts.push(text(MARGIN, y + 4.5, row.role, row.peer));
      for (const column of ["main", "cpu"] as const) parts.push(drawValue(row, column, scales[column], y));
      y += ROW;
    }
    y += 8;
  }
  const axes = [drawAxis(scales.main, axesTop - 6, y - 8), drawAxis(scales.cpu, axesTop - 6, y - 8)];
  if (missing.length > 0) parts.push(text(MARGIN, (y += 16), "soft", `Not on this machine: ${missing.join(", ")}`));
  return [[...axes, ...parts].join("\n"), y + 22];
}

const DESCRIPTION =
  "Bars start at a line, which is nginx or curl, and go to the right where a program does better. Logarithmic scale.";

/** The whole drawing. */
export function draw(results: Results): string {
  const parts = [
    text(MARGIN, 44, "headline", "http-over-tcp beside its peers"),
    text(MARGIN, 70, "soft", "Right of the line is better than the reference. Twice and half are as far from it."),
    text(MARGIN, 92, "soft", "Bars: medians. Strokes: rounds. CPU: user and system, a request, GiB or run."),
    text(MARGIN, 114, "soft", "floor: what the kernel alone takes, asked by a C program that believes everything."),
  ];
  let bottom = 138;
  for (const subject of SUBJECTS) {
    const result = results[subject];
    if (result === undefined) continue;
    const [svg, end] = drawSubject(subject, result, bottom);
    parts.push(svg);
    bottom = end;
  }
  const title = '<title id="title">http-over-tcp beside its peers</title>';
  const description = `<desc id="description">${DESCRIPTION} The figures are in RESULTS.md.</desc>`;
  const frame = `<rect width="${WIDTH}" height="${round(bottom)}" rx="10" fill="var(--paper)"/>`;
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDTH} ${round(bottom)}" width="${WIDTH}" height="${round(bottom)}" role="img" aria-labelledby="title description">
${title}${description}<style>${STYLE}
</style>
${frame}
${parts.join("\n")}
</svg>
`;
}

export const writeDrawing = (results: Results) => writeFileSync(join(import.meta.dir, "results.svg"), draw(results));
