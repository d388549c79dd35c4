// Shows what a node of ours says about its work as text on the node. The stock interface does so
// for its own preview nodes only.
import { app } from "../../scripts/app.js";

const NAME = "perfusion_text";
const LINE = 12; // pixels
const LETTERS = 60; // of a line
const MOST_LINES = 30;
const WIDTH = 420; // of a node with more than a line or two

function textWidget(node) {
  const found = node.widgets?.find((widget) => widget.name === NAME);
  if (found) return found;
  const { widget } = app.widgets.STRING(node, NAME, ["STRING", { multiline: true }], app);
  widget.options.read_only = true;
  if (widget.element) widget.element.readOnly = true;
  // It belongs neither into a saved workflow nor into what is sent to the server.
  widget.serialize = false;
  widget.options.serialize = false;
  return widget;
}

function show(node, text) {
  const widget = textWidget(node);
  const rows = text.split("\n").map((line) => Math.ceil(line.length / LETTERS) || 1);
  const lines = Math.min(rows.reduce((sum, count) => sum + count, 1), MOST_LINES);
  widget.options.getMinHeight = () => lines * LINE;
  widget.value = text;
  const [width, height] = node.computeSize();
  const wanted = lines > 3 ? WIDTH : 0;
  node.setSize([Math.max(node.size[0], width, wanted), Math.max(node.size[1], height)]);
  app.graph.setDirtyCanvas(true);
}

app.registerExtension({
  name: "perfusion.show_text",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith("Perfusion")) return;
    const before = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      before?.apply(this, arguments);
      if (output?.text?.length) show(this, output.text.join("\n"));
    };
  },
});
