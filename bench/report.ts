/**
 * RESULTS.md: the figures as tables, with how to read them and what they do not show.
 */
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { run } from "./measure.ts";
import {
  REFERENCES,
  type Results,
  type Row,
  type Subject,
  type SubjectResult,
  SUBJECTS,
  type WorkloadResult,
  median,
} from "./results.ts";

/** Three digits, or two places where that is more than enough. */
export function formatRatio(ratio: number): string {
  if (!Number.isFinite(ratio)) return "–";
  if (ratio >= 9.95) return ratio.toFixed(1);
  return ratio < 0.0995 ? ratio.toFixed(3) : ratio.toFixed(2);
}

const HEADINGS: Readonly<Record<Subject, string>> = {
  server: "The server that answers with a text",
  client: "Downloads",
  files: "The server of files",
};

const HOW_TO_READ: Readonly<Record<Subject, string>> = {
  server: `More requests/s are better, less CPU is better. If two have the same requests/s and one takes less CPU, the load
generator was at its end, not the server: CPU is what a busy machine feels. **floor** is a C loop that parses nothing.
It does not show what a handler with work to do would cost, which soon outweighs all of this.`,
  client: `Less time is better, and less CPU. CPU is the client's own; on the pipe, what \`dd\` takes at its other end is in the time
alone. **floor** copies from socket to stdout and checks next to nothing. To a file, client-robust has synced what it
saved to the disk when it ends; curl and wget leave that to the kernel, which does it later, outside of the measured time: "curl, then sync" is what
it takes. It does not show a network with a delay or losses.`,
  files: `More requests/s and throughput are better; less CPU and memory are better. **floor** opens, sends with sendfile(2) and closes:
what the kernel alone would take. Resident memory is the most while that workload was measured; for programs on Bun some
of it is Bun itself. The large file is read by one reader, which is as busy as the server: throughput is of the two
together, CPU of the server alone. server.ts and nginx open a file for each request; a row shows nginx with \`open_file_cache\`,
which keeps files open. python's http.server was started with \`--protocol HTTP/1.1\`, and logs each request (to /dev/null),
which cannot be switched off; it writes head and content by themselves and leaves Nagle's algorithm on, so each answer on a connection
that stays waits some 40 ms for an acknowledgement: what it could do is in its CPU, not in its requests/s. All files are in the page cache: no disk is measured.`,
};

/** The cells of a row, in the order of the header. */
function formatCells(workload: WorkloadResult, row: Row, hasFloor: boolean, hasMemory: boolean): string[] {
  const floor = workload.rows.find(({ role }) => role === "floor");
  const [main, cpu] = [median(row.main), median(row.cpu)];
  const range = (values: readonly number[]) =>
    `${formatRatio(Math.min(...values))} – ${formatRatio(Math.max(...values))}`;
  const toFloor = (value: number, what: "main" | "cpu") => formatRatio(value / median(floor?.[what] ?? []));
  return [
    row.role === "ours" ? `**${row.peer}**` : row.peer,
    formatRatio(main),
    range(row.main),
    ...(hasFloor ? [toFloor(main, "main")] : []),
    formatRatio(cpu),
    range(row.cpu),
    ...(hasFloor ? [toFloor(cpu, "cpu")] : []),
    ...(hasMemory ? [String(row.residentMiB ?? "–")] : []),
  ];
}

const tableLine = (cells: readonly string[]) => `| ${cells.join(" | ")} |`;

function formatWorkload(workload: WorkloadResult, reference: string): string {
  const hasFloor = workload.rows.some(({ role }) => role === "floor");
  const hasMemory = workload.rows.some(({ residentMiB }) => residentMiB !== undefined);
  const count = workload.rows[0]?.main.length;
  const rounds = `${count} round${count === 1 ? "" : "s"}`;
  const header = [
    workload.name,
    `${workload.main} ÷ ${reference}`,
    rounds,
    ...(hasFloor ? ["÷ floor"] : []),
    `${workload.cpu} ÷ ${reference}`,
    rounds,
    ...(hasFloor ? ["÷ floor"] : []),
    ...(hasMemory ? ["MiB resident"] : []),
  ];
  const lines = [header, header.map((_, i) => (i === 0 ? "---" : "---:"))];
  return [...lines, ...workload.rows.map((row) => formatCells(workload, row, hasFloor, hasMemory))]
    .map(tableLine)
    .join("\n");
}

const formatMissing = (missing: readonly string[]) =>
  missing.length === 0 ? [] : [`Missing on this machine, so not measured: ${missing.join(", ")}.`];

/** The tables of a subject. */
export function formatTable(subject: Subject, { workloads, missing }: SubjectResult): string {
  const tables = workloads.map((workload) => formatWorkload(workload, REFERENCES[subject]));
  return [...tables, ...formatMissing(missing)].join("\n\n");
}

function formatSubject(subject: Subject, result: SubjectResult): string {
  const versions = Object.entries(result.versions).map(([name, version]) => `${name} ${version}`);
  return [
    `## ${HEADINGS[subject]}`,
    `\`${result.command}\`, ${result.when}. ${result.machine}; ${versions.join(", ")}.`,
    formatTable(subject, result),
    HOW_TO_READ[subject],
  ].join("\n\n");
}

const INTRODUCTION = `<!-- Written by \`bun run bench --write\`: changes belong into report.ts. -->

# Results

![Bars for each workload and program, to the right of a line where it does better than nginx or curl](results.svg)

Every figure is a ratio of medians from the interleaved rounds of one run; beside it stand the lowest and the
highest of the rounds, divided by the same median. If the load average before a run is above some tenths, others
used the machine too: that spoils requests/s and times more than CPU. How it is measured: [README.md](README.md).`;

const CLOSING = `## What none of this shows

Other machines, kernels and networks; more than one core for a server; more than 5,000 connections at once; and how
the peers do when somebody who knows them has tuned them. Load generator and server share one machine.`;

/** Writes RESULTS.md, and has it and results.json formatted as the rest of the project is. */
export async function writeReport(results: Results): Promise<void> {
  const parts = SUBJECTS.flatMap((subject) => {
    const result = results[subject];
    return result === undefined ? [] : [formatSubject(subject, result)];
  });
  const files = [join(import.meta.dir, "RESULTS.md"), join(import.meta.dir, "results.json")];
  writeFileSync(files[0] ?? "", `${[INTRODUCTION, ...parts, CLOSING].join("\n\n")}\n`);
  await run([process.execPath, "fmt", ...files], { cwd: join(import.meta.dir, "..") });
}
