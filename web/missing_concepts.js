// A workflow that names concepts one does not have says which, and where they could come from.
import { app } from "../../scripts/app.js";
import { LOADER, concepts, ready } from "./concept_files.js";

function whence(name) {
  const saver = app.graph.nodes.find((node) => {
    if (node.type !== "PerfusionSaveConcept") return false;
    const prefix = node.widgets?.find((widget) => widget.name === "filename_prefix")?.value;
    return prefix && name.startsWith(prefix);
  });
  if (saver) return `run this page once: "${saver.title}" makes it`;
  return (
    "train it, or ask whoever made the workflow for the file and drop it on the page, or choose " +
    "another in the node's menu"
  );
}

app.registerExtension({
  name: "perfusion.missing_concepts",
  async afterConfigureGraph() {
    const loaders = app.graph.nodes.filter((node) => node.type === LOADER);
    if (!loaders.length) return;
    await ready();
    for (const node of loaders) {
      const name = node.widgets?.find((widget) => widget.name === "concept_name")?.value;
      if (!name || concepts().includes(name)) continue;
      app.extensionManager?.toast?.add({
        severity: "warn",
        summary: `The concept ${name} is not in models/perfusion`,
        detail: `${node.title}: ${whence(name)}.`,
        life: 15000,
      });
    }
  },
});
