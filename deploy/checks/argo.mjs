// Reads manifests of Argo's kinds as JSON and holds them against Argo's types: their values by the
// schemas, and by TypeScript that there is no field which the types do not know.
import { spawnSync } from "node:child_process";
import { readFileSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const HOME = {
  Application: "@kubernetes-models/argo-cd",
  CronWorkflow: "@kubernetes-models/argo-workflows",
  Workflow: "@kubernetes-models/argo-workflows",
  WorkflowTemplate: "@kubernetes-models/argo-workflows",
};
const documents = JSON.parse(readFileSync(0, "utf8"));
const here = dirname(fileURLToPath(import.meta.url));
const literals = [];
let faults = 0;
const fault = (text) => {
  faults += 1;
  console.log(text);
};

for (const [n, document] of documents.entries()) {
  const name = `${document.kind}/${document.metadata.name}`;
  const home = HOME[document.kind];
  if (!home) {
    fault(`${name}: unknown kind`);
    continue;
  }
  const from = `${home}/argoproj.io/v1alpha1`;
  const { [document.kind]: Model } = await import(from);
  try {
    new Model(document).validate();
  } catch (error) {
    fault(`${name}: ${error.message}`);
  }
  literals.push(`import type { I${document.kind} as I${n} } from "${from}";`);
  literals.push(`export const d${n}: I${n} = ${JSON.stringify(document, null, 1)};`);
}

const file = join(here, `argo-${process.pid}.ts`);
writeFileSync(file, literals.join("\n"));
const tsc = join(here, "node_modules", "typescript", "bin", "tsc");
const options = ["--noEmit", "--strict", "--skipLibCheck", "--module", "nodenext"];
const typed = spawnSync(process.execPath, [tsc, ...options, file], { encoding: "utf8" });
rmSync(file);
if (typed.status !== 0) fault(typed.stdout + typed.stderr);
process.exit(faults ? 1 : 0);
