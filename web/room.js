// How far a node may grow without covering another one.
import { app } from "../../scripts/app.js";

const TITLE = 30;
const GAP = 10;

// The height and width that are free for a node, Infinity where nothing is in the way.
export function roomOf(node) {
  const [x, y] = node.pos;
  const [width, height] = node.size;
  let right = Infinity;
  let bottom = Infinity;
  for (const other of (node.graph ?? app.graph).nodes) {
    if (other === node) continue;
    const [left, top, wide, high] = other.boundingRect;
    if (left < x + width && left + wide > x && top >= y + height) {
      bottom = Math.min(bottom, top);
    }
    if (top < y + height && top + high > y - TITLE && left >= x + width) {
      right = Math.min(right, left);
    }
  }
  return [right - x - GAP, bottom - y - GAP];
}

// Grow a node to a size if there is room, as far as there is; never below what it needs.
export function growTo(node, width, height) {
  const least = node.computeSize();
  const room = roomOf(node);
  node.setSize([
    Math.max(node.size[0], least[0], Math.min(width, room[0])),
    Math.max(node.size[1], least[1], Math.min(height, room[1])),
  ]);
  app.graph.setDirtyCanvas(true, true);
}

// The node of an id of the server's, which for nodes inside subgraphs is a path such as "4:12".
export function nodeOf(id) {
  let graph = app.rootGraph ?? app.graph;
  let node = null;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(part) ?? graph?.getNodeById(Number(part));
    graph = node?.subgraph;
  }
  return node;
}
