// Opens a page of ours at a size at which it can be read: all of it if that is large enough, else
// its upper left part. The stock interface fits everything, however small it becomes.
import { app } from "../../scripts/app.js";

const READABLE = 0.7; // of the size at which text on nodes is 12 to 14 pixels high
const LARGEST = 1;
// What lies over the canvas: side bar, tabs and buttons.
const EDGES = { left: 80, top: 90, right: 30, bottom: 30 };

let fresh = false;

function boundsOf(graph) {
  const boxes = [
    ...graph.nodes.map((node) => node.boundingRect),
    ...graph.groups.map((group) => [...group.pos, ...group.size]),
  ];
  const left = Math.min(...boxes.map((box) => box[0]));
  const top = Math.min(...boxes.map((box) => box[1]));
  const right = Math.max(...boxes.map((box) => box[0] + box[2]));
  const bottom = Math.max(...boxes.map((box) => box[1] + box[3]));
  return { left, top, width: right - left, height: bottom - top };
}

function openAtReadableSize() {
  const canvas = app.canvas;
  const page = boundsOf(app.graph);
  const view = canvas.canvas.getBoundingClientRect();
  const width = view.width - EDGES.left - EDGES.right;
  const height = view.height - EDGES.top - EDGES.bottom;
  const whole = Math.min(width / page.width, height / page.height, LARGEST);
  const scale = Math.max(whole, READABLE);
  // In the middle where there is room, at the edge where there is not.
  const spare = (room, size) => Math.max(0, (room / scale - size) / 2);
  canvas.ds.scale = scale;
  canvas.ds.offset[0] = EDGES.left / scale - page.left + spare(width, page.width);
  canvas.ds.offset[1] = EDGES.top / scale - page.top + spare(height, page.height) / 2;
  canvas.setDirty(true, true);
}

app.registerExtension({
  name: "perfusion.page_view",
  beforeConfigureGraph(data) {
    // A page that was saved by a person opens the way they left it.
    fresh = Boolean(data?.extra?.perfusion_page && !data.extra.ds);
  },
  afterConfigureGraph() {
    if (!fresh) return;
    fresh = false;
    // The stock interface fits the page after this.
    requestAnimationFrame(() => requestAnimationFrame(openAtReadableSize));
  },
});
