// The stock interface's own stores, for what it offers extensions no other way to. Undefined where
// an interface of another version has none of that name: what uses them does without then.
export function store(name) {
  const root = document.querySelector("#vue-app")?.__vue_app__;
  return root?.config.globalProperties.$pinia?._s?.get(name);
}
