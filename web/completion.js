// Completes placeholders while a prompt is typed: those of the concepts on the page first, then
// those of the concept files. It keeps quiet while another pack's completion is open.
import { app } from "../../scripts/app.js";
import { LOADER, aboutConcept, concepts, isCheckpoint, ready } from "./concept_files.js";

const MOST = 8;
const MOST_FILES = 200;
const SHORTEST = 2; // letters of a placeholder that does not begin with a sign such as <
const OTHERS = ".pysssss-autocomplete, .autocomplete-parent, .autocomplete-results";

let list; // the open list: {box, area, from, words, at}

async function words() {
  const onPage = [];
  for (const node of app.graph.nodes) {
    const value = (name) => node.widgets?.find((widget) => widget.name === name)?.value;
    if (node.type === LOADER) {
      onPage.push((await aboutConcept(value("concept_name")))?.placeholder);
    }
    if (node.type === "PerfusionTrainConcept") onPage.push(value("placeholder"));
  }
  const names = concepts().filter((name) => !isCheckpoint(name));
  const files = await Promise.all(names.slice(0, MOST_FILES).map(aboutConcept));
  return [...new Set([...onPage, ...files.map((metadata) => metadata?.placeholder)])].filter(Boolean);
}

// Where the placeholder that is being typed begins, and what of it is there.
function typed(area) {
  const before = area.value.slice(0, area.selectionStart);
  const start = before.match(/(<[^<>\s]*|[^\s,.;:()<>]+)$/);
  return start && { from: start.index, text: start[0].toLowerCase() };
}

function close() {
  list?.box.remove();
  list = undefined;
}

function mark(at) {
  list.at = (at + list.words.length) % list.words.length;
  [...list.box.children].forEach((line, index) => {
    line.style.background = index === list.at ? "#2a4a6a" : "";
  });
}

function accept(word) {
  const { area, from } = list;
  close();
  area.setRangeText(word, from, area.selectionStart, "end");
  // What the interface keeps of the text follows this event.
  area.dispatchEvent(new Event("input", { bubbles: true }));
  close();
  area.focus();
}

function open(area, from, found) {
  close();
  const box = document.createElement("div");
  box.className = "perfusion-completion";
  box.style.cssText =
    "position:fixed;z-index:9999;background:#222;color:#ddd;border:1px solid #555;" +
    "border-radius:4px;font:13px sans-serif;min-width:120px;overflow:hidden";
  const place = area.getBoundingClientRect();
  box.style.left = `${place.left}px`;
  box.style.top = `${Math.min(place.bottom, window.innerHeight - 24 * found.length - 10)}px`;
  for (const word of found) {
    const line = document.createElement("div");
    line.textContent = word;
    line.style.cssText = "padding:3px 8px;cursor:pointer";
    // Before the text loses the focus.
    line.addEventListener("mousedown", (event) => {
      event.preventDefault();
      accept(word);
    });
    box.append(line);
  }
  document.body.append(box);
  list = { box, area, from, words: found, at: 0 };
  mark(0);
}

const isPrompt = (area) =>
  area instanceof HTMLTextAreaElement &&
  !area.readOnly &&
  area.closest(".comfy-multiline-input, [data-node-id], .dom-widget, .graph-canvas-container");

async function onInput({ target: area, isTrusted }) {
  if (!isPrompt(area)) return;
  const start = typed(area);
  const enough = start && (start.text.startsWith("<") || start.text.length >= SHORTEST);
  if (!enough || !isTrusted) return close();
  await ready();
  const known = await words();
  const found = known
    .filter((word) => word.toLowerCase().startsWith(start.text) && word.toLowerCase() !== start.text)
    .slice(0, MOST);
  const others = [...document.querySelectorAll(OTHERS)].some((box) => box.offsetHeight > 0);
  if (!found.length || others || document.activeElement !== area) return close();
  open(area, start.from, found);
}

function onKey(event) {
  if (!list || event.target !== list.area) return;
  const steps = { ArrowDown: 1, ArrowUp: -1 };
  if (event.key in steps) mark(list.at + steps[event.key]);
  else if (event.key === "Tab" || (event.key === "Enter" && !event.ctrlKey && !event.metaKey)) {
    accept(list.words[list.at]);
  } else if (event.key === "Escape") close();
  else return;
  event.preventDefault();
  event.stopImmediatePropagation();
}

app.registerExtension({
  name: "perfusion.completion",
  settings: [
    {
      id: "Perfusion.Completion",
      category: ["Perfusion", "Prompts", "Completion"],
      name: "Complete placeholders while a prompt is typed",
      type: "boolean",
      defaultValue: true,
      onChange: (wanted) => {
        const change = wanted ? "addEventListener" : "removeEventListener";
        document[change]("input", onInput);
        document[change]("keydown", onKey, { capture: true });
        document[change]("focusout", close);
        if (!wanted) close();
      },
    },
  ],
});
