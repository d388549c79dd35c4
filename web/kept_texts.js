// What nodes said about their work, kept in the browser: a workflow's file is not the place for it,
// since it may be given away, and the stock interface forgets it on a reload.
import { app } from "../../scripts/app.js";

const KEY = "perfusion.says";
const MOST_WORKFLOWS = 20;
const MOST_LETTERS = 20000;

function read() {
  try {
    return JSON.parse(localStorage.getItem(KEY)) ?? {};
  } catch {
    return {};
  }
}

function write(all) {
  const newest = Object.entries(all)
    .sort(([, one], [, other]) => other.time - one.time)
    .slice(0, MOST_WORKFLOWS);
  try {
    localStorage.setItem(KEY, JSON.stringify(Object.fromEntries(newest)));
  } catch {
    // The browser's storage is full or forbidden: texts then last until the reload.
  }
}

function workflow() {
  return app.extensionManager?.workflow?.activeWorkflow?.path ?? "";
}

export function keep(node, text) {
  const all = read();
  const mine = (all[workflow()] ??= { nodes: {} });
  mine.time = Date.now();
  mine.nodes[node.id] = { type: node.type, text: text.slice(0, MOST_LETTERS) };
  write(all);
}

export function kept(node) {
  const found = read()[workflow()]?.nodes[node.id];
  return found?.type === node.type ? found.text : undefined;
}

export function forget() {
  const all = read();
  if (!(workflow() in all)) return;
  delete all[workflow()];
  write(all);
}
