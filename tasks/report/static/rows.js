"use strict";
// The report's rows: loaded a few hundred images at a time, in order. A data file hands them over by
// `diffcolor.receive`, because a page that was opened from a disk may not fetch files.

const diffcolor = (() => {
  const setting = JSON.parse(document.body.dataset.setting);
  const waiting = new Map(); // digest -> resolve
  const results = []; // in the order of the manifest: image, then variant
  const images = new Map(); // key -> {key, width, height, columns, results, details, place}
  const listeners = [];
  let loaded = false;

  function receive(digest, rows) {
    waiting.get(digest)(rows);
  }

  function load(digest) {
    return new Promise((resolve, reject) => {
      waiting.set(digest, resolve);
      const script = document.createElement("script");
      script.src = `data/${digest}.js`;
      script.onload = () => script.remove();
      script.onerror = () => reject(new Error("The report has been written anew since this page was opened: reload it."));
      document.head.append(script);
    });
  }

  function add(rows, details) {
    rows.forEach(([key, width, height, columns, records], place) => {
      const image = { key, width, height, columns, details, place, results: [] };
      for (const record of records) {
        const result = { image, number: results.length };
        setting.columns.forEach((name, i) => { result[name] = record[i]; });
        image.results.push(result);
        results.push(result);
      }
      images.set(key, image);
    });
  }

  async function loadAll() {
    const started = [];
    for (const [i, [, details]] of setting.files.entries()) {
      const ahead = i === 0 ? 1 : 4; // the first rows are shown before the others are asked for
      for (const [index] of setting.files.slice(started.length, i + ahead)) started.push(load(index));
      add(await started[i], details);
      loaded = i === setting.files.length - 1;
      tell();
    }
  }

  let told = 0;
  let timer = null;
  function tell() { // at once for the first rows and the last, otherwise a few times a second
    clearTimeout(timer);
    const now = () => { told = performance.now(); listeners.forEach((listener) => listener()); };
    if (loaded || performance.now() - told > 250) now();
    else timer = setTimeout(now, 250);
  }

  // The records in full of an image's results.
  const known = new Map();
  async function details(image) {
    if (!known.has(image.details)) {
      if (known.size > 20) known.clear();
      known.set(image.details, load(image.details));
    }
    return (await known.get(image.details))[image.place];
  }

  function text(result) { // what a search looks at
    result.text ??= [result.image.key, result.variant, result.target_prompt, result.context_prompt, result.error_class,
      ...result.image.columns.flat()].filter(Boolean).join("\n").toLowerCase();
    return result.text;
  }

  const thumbnail = (digest) => `thumbs/${digest.slice(0, 2)}/${digest}.webp`;

  // An element with attributes and children. Text is always text, never markup.
  function el(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }

  function address(parts) { // of a view of this page
    const named = Object.entries(parts).filter(([, value]) => value !== "" && value !== null && value !== undefined);
    return "#" + named.map(([name, value]) => `${name}=${encodeURIComponent(value)}`).join("&");
  }

  return {
    setting, results, images, receive, loadAll, details, text, thumbnail, el, address,
    onrows: (listener) => listeners.push(listener),
    get loaded() { return loaded; },
  };
})();
