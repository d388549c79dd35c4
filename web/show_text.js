// Shows what a node of ours says about its work as text on the node, also after another tab was
// open or the page was loaded again. The stock interface does so for its own preview nodes only.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { forget, keep, kept } from "./kept_texts.js";
import { growTo, nodeOf } from "./room.js";
import { store } from "./stores.js";

const NAME = "perfusion_text";
const LINE = 15; // pixels
const LETTER = 6.2;
const LEAST_LINES = 3;
const MOST_LINES = 26;
const WIDTH = 380; // of a node with more than a line or two
const MARK = "! "; // before a hint
const ENOUGH = 30; // more height than the least, in which a text can be read and scrolled

let fresh = false;

function textWidget(node) {
  const found = node.widgets?.find((widget) => widget.name === NAME);
  if (found) return found;
  const { widget } = app.widgets.STRING(node, NAME, ["STRING", { multiline: true }], app);
  widget.label = "report";
  widget.options.read_only = true;
  if (widget.element) widget.element.readOnly = true;
  widget.options.getMinHeight = () => LEAST_LINES * LINE;
  // It belongs neither into a saved workflow nor into what is sent to the server.
  widget.serialize = false;
  widget.options.serialize = false;
  return widget;
}

function linesOf(text, width) {
  const letters = Math.max(20, Math.floor((width - 40) / LETTER));
  const rows = text.split("\n").map((line) => Math.ceil(line.length / letters) || 1);
  return Math.min(rows.reduce((sum, count) => sum + count, 0), MOST_LINES);
}

function show(node, text) {
  const isNew = !node.widgets?.some((widget) => widget.name === NAME);
  const before = [...node.size];
  const widget = textWidget(node);
  widget.value = text;
  if (isNew) {
    // Adding a widget may have grown it; it grows where it lacks room only, and only as far as it
    // covers nothing.
    node.setSize(before);
    const least = node.computeSize()[1];
    const lines = linesOf(text, before[0]);
    const width = Math.max(before[0], lines > LEAST_LINES ? WIDTH : 0);
    const enough = before[1] >= least + (lines > LEAST_LINES ? ENOUGH : 0);
    const more = (linesOf(text, width) + 1 - LEAST_LINES) * LINE;
    if (enough) growTo(node, ...before);
    else growTo(node, width, least + Math.max(0, more));
  }
  app.graph.setDirtyCanvas(true, true);
}

// A node's report with this run's hints above it; it stays when a run has nothing new to say.
function say(node, { hints, report }) {
  const said = (node.perfusionSaid ??= { hints: [], report: "" });
  if (hints) said.hints = hints;
  if (report !== undefined) said.report = report;
  const text = [...said.hints.map((hint) => MARK + hint), said.report].filter(Boolean).join("\n");
  if (text || node.widgets?.some((widget) => widget.name === NAME)) show(node, text);
  keep(node, text);
}

function restore(node) {
  const text = kept(node) ?? app.nodeOutputs?.[node.id]?.text?.join("\n");
  if (!text) return;
  const lines = text.split("\n");
  const isHint = (line) => line.startsWith(MARK);
  const hints = lines.filter(isHint).map((line) => line.slice(MARK.length));
  say(node, { hints, report: lines.filter((line) => !isHint(line)).join("\n") });
}

// Where a hint belongs: on the node of ours that it came from, or on the one before a sampler.
function placeOf(node, seen = new Set()) {
  if (!node || seen.has(node)) return undefined;
  seen.add(node);
  if (isOurs(node)) return node;
  for (const at of node.inputs?.keys() ?? []) {
    const found = placeOf(node.getInputNode(at), seen);
    if (found) return found;
  }
  return undefined;
}

function hint({ detail }) {
  const node = nodeOf(detail.node);
  const place = placeOf(node);
  const { hints: old = [], before = [] } = place?.perfusionSaid ?? {};
  if (place && !old.includes(detail.text)) say(place, { hints: [...old, detail.text] });
  if (place) (place.perfusionSaid.from ??= {})[detail.text] = String(detail.node);
  // The node says it already: a page that is run again and again would fill up with toasts.
  if ([...old, ...before].includes(detail.text)) return;
  app.extensionManager?.toast?.add({
    severity: "warn",
    summary: (place ?? node)?.title ?? "Perfusion",
    detail: detail.text,
    life: 20000,
  });
}

function forgetHints() {
  for (const node of app.graph.nodes) {
    if (!node.perfusionSaid) continue;
    node.perfusionSaid.before = node.perfusionSaid.hints;
    if (node.perfusionSaid.hints.length) say(node, { hints: [] });
  }
}

// What a node said that did not have to run again still holds.
function keepCached({ detail }) {
  for (const node of app.graph.nodes) {
    const { hints = [], before = [], from = {} } = node.perfusionSaid ?? {};
    const still = before.filter((text) => detail.nodes?.includes(from[text]) && !hints.includes(text));
    if (still.length) say(node, { hints: [...hints, ...still] });
  }
}

const isOurs = (node) => node.type?.startsWith("Perfusion");

app.registerExtension({
  name: "perfusion.show_text",
  setup() {
    api.addEventListener("perfusion.hint", hint);
    api.addEventListener("execution_start", forgetHints);
    api.addEventListener("execution_cached", keepCached);
  },
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith("Perfusion")) return;
    const before = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      before?.apply(this, arguments);
      // What was shown on the way; Nodes 2.0 would show it beside what came out.
      if (output?.images?.length) store("nodeOutput")?.revokePreviewsByLocatorId?.(String(this.id));
      if (!output?.text?.length) return;
      say(this, { report: output.text.join("\n") });
    };
  },
  beforeConfigureGraph(data) {
    fresh = Boolean(data?.extra?.perfusion_page && !data.extra.ds);
  },
  afterConfigureGraph() {
    const anew = fresh;
    // Only then is it known which workflow is open, and what its nodes gave out.
    requestAnimationFrame(() => {
      if (anew) forget();
      else app.graph.nodes.filter(isOurs).forEach(restore);
    });
  },
});
