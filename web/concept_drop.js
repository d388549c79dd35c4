// A concept file dropped on the page is put into models/perfusion and gets a loader.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { LOADER, refresh } from "./concept_files.js";
import { store } from "./stores.js";

const HEADER = 4 * 2 ** 20; // bytes that a concept's header may have

async function isConcept(file) {
  const start = new DataView(await file.slice(0, 8).arrayBuffer());
  if (start.byteLength < 8) return false;
  const length = Number(start.getBigUint64(0, true));
  if (length > HEADER) return false;
  try {
    return "perfusion_version" in JSON.parse(await file.slice(8, 8 + length).text()).__metadata__;
  } catch {
    return false;
  }
}

function addLoader(name, [x, y]) {
  const node = window.LiteGraph.createNode(LOADER);
  node.pos = [x, y];
  app.graph.add(node);
  node.widgets.find((widget) => widget.name === "concept_name").value = name;
  node.widgets.find((widget) => widget.name === "concept_name").callback?.(name);
  return node;
}

async function take(file, place) {
  const address = `/perfusion/concepts?name=${encodeURIComponent(file.name)}`;
  const answer = await api.fetchApi(address, { method: "POST", body: file });
  const { name, error } = await answer.json();
  if (error) {
    app.extensionManager.toast.add({ severity: "error", summary: "No concept", detail: error });
    return;
  }
  await refresh();
  addLoader(name, place);
}

async function onDrop(event) {
  const files = [...(event.dataTransfer?.files ?? [])];
  if (!files.length || !files.every((file) => file.name.toLowerCase().endsWith(".safetensors"))) {
    return;
  }
  // It has to be decided now, and what is in a file is known later only.
  event.preventDefault();
  event.stopImmediatePropagation();
  const [x, y] = app.canvas.convertEventToCanvasOffset(event);
  for (const [at, file] of files.entries()) {
    if (await isConcept(file)) await take(file, [x, y + at * 200]);
    else await app.handleFile(file);
  }
}

app.registerExtension({
  name: "perfusion.concept_drop",
  setup() {
    document.addEventListener("drop", onDrop, { capture: true });
    // A click on a concept in the model library adds a loader, as one on a LoRA does.
    store("modelToNode")?.quickRegister?.("perfusion", LOADER, "concept_name");
  },
});
