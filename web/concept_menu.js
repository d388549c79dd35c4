// Load Concept: its menu without the checkpoints of trainings, always up to date; a picture of the
// concept; ways to use it by a right click.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import {
  LOADER,
  aboutConcept,
  concepts,
  isCheckpoint,
  onConcepts,
  ready,
  refresh,
  thumbnailOf,
} from "./concept_files.js";

const SHOW = "Perfusion.ShowCheckpoints";
const PICTURE = 64;
const APPLY = "PerfusionApplyConcepts";
const SAVERS = ["PerfusionSaveConcept", "PerfusionTrainConcept"];

const shown = () => Boolean(app.extensionManager?.setting?.get(SHOW));
const widgetOf = (node) => node.widgets?.find((widget) => widget.name === "concept_name");

function* allNodes(graph = app.rootGraph ?? app.graph) {
  for (const node of graph?.nodes ?? []) {
    yield node;
    if (node.subgraph) yield* allNodes(node.subgraph);
  }
}

function offer(node) {
  const widget = widgetOf(node);
  if (!widget) return;
  // What is chosen stays in the menu, whatever it is.
  widget.options.values = concepts().filter(
    (name) => shown() || !isCheckpoint(name) || name === widget.value,
  );
}

function offerAll() {
  for (const node of allNodes()) if (node.type === LOADER) offer(node);
  app.graph?.setDirtyCanvas(true, true);
}

function cardOf(node) {
  const box = document.createElement("div");
  box.className = "perfusion-card";
  box.style.cssText =
    "display:flex;gap:8px;align-items:center;overflow:hidden;font:12px sans-serif;color:#aaa";
  const picture = document.createElement("img");
  picture.style.cssText = `height:${PICTURE}px;width:${PICTURE}px;object-fit:cover;border-radius:4px`;
  picture.alt = "";
  const words = document.createElement("div");
  words.style.cssText = "white-space:pre-line;overflow:hidden";
  box.append(picture, words);
  const widget = node.addDOMWidget("perfusion_card", "perfusion_card", box, {
    serialize: false,
    getMinHeight: () => PICTURE + 8,
    getMaxHeight: () => PICTURE + 8,
  });
  widget.serialize = false;
  return { picture, words };
}

async function showCard(node) {
  const name = widgetOf(node)?.value;
  const metadata = name ? await aboutConcept(name) : null;
  if (widgetOf(node)?.value !== name) return;
  const { picture, words } = (node.perfusionCard ??= cardOf(node));
  const url = thumbnailOf(metadata);
  picture.src = url;
  picture.style.display = url ? "" : "none";
  words.textContent = metadata
    ? `${metadata.placeholder}\n${metadata.superclass}, ${metadata.family}`
    : name && concepts().length
      ? `${name} is not in models/perfusion`
      : "";
}

function watch(node) {
  const widget = widgetOf(node);
  const before = widget.callback;
  widget.callback = function (...values) {
    const given = before?.apply(this, values);
    showCard(node);
    return given;
  };
}

function use(node) {
  const graph = node.graph ?? app.graph;
  let apply = graph.nodes.find((other) => other.type === APPLY);
  if (!apply) {
    apply = window.LiteGraph.createNode(APPLY);
    graph.add(apply);
    apply.pos = [node.pos[0] + node.size[0] + 60, node.pos[1]];
  }
  const free = apply.inputs.findIndex(
    (slot) => slot.type === "PERFUSION_CONCEPT" && slot.link == null,
  );
  if (free >= 0) node.connect(0, apply, free);
  graph.setDirtyCanvas(true, true);
}

async function copyTrigger(node) {
  const name = widgetOf(node)?.value;
  const word = name ? (await aboutConcept(name))?.placeholder : null;
  if (!word) return;
  await navigator.clipboard.writeText(word);
  app.extensionManager?.toast?.add({ severity: "success", summary: `Copied ${word}`, life: 2000 });
}

async function toggle() {
  await app.extensionManager.setting.set(SHOW, !shown());
  offerAll();
}

app.registerExtension({
  name: "perfusion.concept_menu",
  settings: [
    {
      id: SHOW,
      category: ["Perfusion", "Load Concept", "Checkpoints"],
      name: "List the checkpoints of trainings (runs/...) too",
      type: "boolean",
      defaultValue: false,
      onChange: () => offerAll(),
    },
  ],
  async setup() {
    onConcepts(() => {
      offerAll();
      for (const node of allNodes()) if (node.type === LOADER) showCard(node);
    });
    await ready();
    api.addEventListener("executed", ({ detail }) => {
      const id = String(detail?.display_node ?? detail?.node ?? "");
      const node = (app.rootGraph ?? app.graph).getNodeById(id.split(":")[0]);
      if (SAVERS.includes(node?.type) || node?.subgraph) refresh();
    });
    // A training that was cut off has left a concept, too.
    api.addEventListener("execution_interrupted", () => refresh());
  },
  nodeCreated(node) {
    if (node.comfyClass !== LOADER) return;
    watch(node);
    offer(node);
    // Its value is set after this where a workflow is opened.
    requestAnimationFrame(() => {
      offer(node);
      showCard(node);
    });
  },
  getNodeMenuItems(node) {
    if (node.comfyClass !== LOADER) return [];
    return [
      null,
      { content: "Use in Apply Concepts", callback: () => use(node) },
      { content: "Copy trigger phrase", callback: () => copyTrigger(node) },
      {
        content: shown() ? "Hide checkpoints of trainings" : "List checkpoints of trainings",
        callback: toggle,
      },
    ];
  },
});
