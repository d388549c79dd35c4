// The concept files the server has, and what each says about itself.
import { api } from "../../scripts/api.js";

export const LOADER = "PerfusionLoadConcept";

let names = [];
let loading;
const about = new Map();
const listeners = new Set();

// Concepts that a training kept on its way; there are many, and few are wanted.
export const isCheckpoint = (name) => /^runs[\\/]/.test(name);

export const concepts = () => names;

// Called with all names, now and whenever they change.
export function onConcepts(listener) {
  listeners.add(listener);
  if (names.length) listener(names);
}

export async function refresh() {
  const answer = await api.fetchApi(`/object_info/${LOADER}`, { cache: "no-store" });
  const [kind, options] = (await answer.json())[LOADER].input.required.concept_name;
  names = Array.isArray(kind) ? kind : options.options;
  about.clear();
  for (const listener of listeners) listener(names);
  return names;
}

// Waits for the first list.
export function ready() {
  loading ??= refresh();
  return loading;
}

// The texts in a concept's file; null when there is no such file.
export function aboutConcept(name) {
  if (!about.has(name)) {
    const address = `/view_metadata/perfusion?filename=${encodeURIComponent(name)}`;
    const answer = api
      .fetchApi(address, { cache: "no-store" })
      .then((response) => (response.ok ? response.json() : null))
      .catch(() => null);
    about.set(name, answer);
  }
  return about.get(name);
}

// Only pictures within the file itself are shown; an address would be asked for its picture.
export function thumbnailOf(metadata) {
  const url = metadata?.["modelspec.thumbnail"] ?? "";
  return /^data:image\/(jpeg|png|webp);base64,[A-Za-z0-9+/=]+$/.test(url) ? url : "";
}
