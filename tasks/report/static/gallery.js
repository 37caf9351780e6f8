"use strict";
// The gallery: search, filters, order, and a grid that holds only the cards near the screen.

diffcolor.gallery = (() => {
  const { el, results, text, thumbnail, address, choices } = diffcolor;
  const form = document.getElementById("filters");
  const grid = document.getElementById("cards");
  const askMany = document.getElementById("ask-many");
  const fields = ["q", "status", "words", "choice", "run", "sort", "order"];
  const selected = new Set();
  let found = [];
  const shown = new Map(); // place in `found` -> card

  // ---------------------------------------------------------------- which results, in which order

  const asked = () => Object.fromEntries(fields.map((name) => [name, form.elements[name].value]));

  const rules = {
    status: (result, value) => result.status === value,
    run: (result, value) => result.run_id === value,
    words: (result, value) => result.obeyed === { yes: true, no: false, none: null }[value],
    choice: (result, value) => (choices.of(result)?.choice ?? "open") === value && result.status === "ok",
  };

  function find({ keep = false } = {}) { // keep: cards that show the same result stay as they are
    const want = asked();
    const terms = want.q.toLowerCase().split(/\s+/).filter(Boolean);
    const active = Object.keys(rules).filter((name) => want[name]);
    found = results.filter((result) => active.every((name) => rules[name](result, want[name])) &&
      terms.every((term) => text(result).includes(term)));
    if (want.sort) {
      const value = (result) => result[want.sort];
      const turn = want.order === "down" ? -1 : 1;
      found.sort((a, b) => {
        if (value(a) === null || value(b) === null) return (value(a) === null) - (value(b) === null); // unknown: last
        return turn * (value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : 0);
      });
    } else if (want.order === "down") found.reverse();
    const more = diffcolor.loaded ? "" : ", still loading";
    document.getElementById("num-found").textContent = `${found.length} of ${results.length} results${more}`;
    fillRuns();
    for (const [place, card] of shown) {
      if (keep && found[place] === card.result) card.setAttribute("aria-setsize", found.length);
      else { card.remove(); shown.delete(place); }
    }
    draw();
  }

  function fillRuns() {
    const select = form.elements.run;
    const there = new Set([...select.options].map((option) => option.value));
    for (const run of new Set(results.map((result) => result.run_id))) {
      if (!there.has(run)) select.append(el("option", { value: run }, run));
    }
    if (wantedRun && select.value !== wantedRun) {
      select.value = wantedRun;
      if (select.value === wantedRun) { wantedRun = ""; find(); }
    }
  }

  // ---------------------------------------------------------------- the cards near the screen

  function draw() {
    if (grid.offsetParent === null) return; // another view is shown
    const style = getComputedStyle(grid);
    const columns = style.gridTemplateColumns.split(" ").length;
    const rowHeight = parseFloat(style.gridAutoRows) + parseFloat(style.rowGap);
    const rows = Math.ceil(found.length / columns);
    const top = grid.getBoundingClientRect().top;
    const first = Math.max(0, Math.floor(-top / rowHeight) - 2);
    const last = Math.min(rows, Math.ceil((innerHeight - top) / rowHeight) + 2);
    grid.style.paddingTop = `${Math.min(first, rows) * rowHeight}px`;
    grid.style.paddingBottom = `${Math.max(0, rows - last) * rowHeight}px`;
    const from = first * columns;
    const to = Math.min(found.length, last * columns);
    for (const [place, card] of shown) {
      if (place < from || place >= to) { card.remove(); shown.delete(place); }
    }
    let before = null; // the card that the next one comes after: what stays in place keeps its focus
    for (let place = from; place < to; place++) {
      let card = shown.get(place);
      if (!card) {
        card = makeCard(found[place], place);
        card.result = found[place];
        shown.set(place, card);
        if (before) before.after(card); else grid.prepend(card);
      }
      before = card;
    }
  }

  function makeCard(result, place) {
    const { image } = result;
    const about = result.target_prompt ?? (result.status === "ok" ? "primary: no colours asked for" : result.error_class);
    const picture = el("span", { class: "mat" });
    if (result.output_thumb) {
      picture.append(el("img", { src: thumbnail(result.output_thumb), alt: "", loading: "lazy", decoding: "async" }));
      if (result.scan_thumb) picture.append(el("img", { class: "scan", src: thumbnail(result.scan_thumb), alt: "", loading: "lazy" }));
    } else if (result.scan_thumb) {
      picture.append(el("img", { src: thumbnail(result.scan_thumb), alt: "", loading: "lazy", decoding: "async" }));
    } else picture.append(el("span", { class: "none" }, "no picture"));
    const choice = choices.of(result)?.choice;
    const box = el("input", {
      type: "checkbox", "aria-label": `Select ${image.key}, ${about}`,
      onchange: (event) => { toggle(result, event.target.checked); },
    });
    box.checked = selected.has(result);
    return el("li", { class: `card ${result.status}`, "aria-setsize": found.length, "aria-posinset": place + 1 },
      el("a", { href: address({ view: "picture", image: image.key, variant: result.variant }) },
        picture, el("span", { class: "key" }, image.key), el("span", { class: "about" }, about)),
      el("span", { class: "marks" }, box,
        result.status === "ok" ? null : el("span", { class: `badge ${result.status}` }, result.status),
        result.obeyed === false ? el("span", { class: "badge missed" }, "word missed") : null,
        choice ? el("span", { class: `badge ${choice}` }, choice) : null));
  }

  let pending = false;
  function drawSoon() {
    if (pending) return;
    pending = true;
    requestAnimationFrame(() => { pending = false; draw(); });
  }
  addEventListener("scroll", drawSoon, { passive: true });
  addEventListener("resize", drawSoon);

  // ---------------------------------------------------------------- several at once

  function toggle(result, on) {
    if (on) selected.add(result); else selected.delete(result);
    showSelection();
  }

  function showSelection() {
    askMany.hidden = selected.size === 0;
    document.getElementById("num-selected").textContent = `${selected.size} result${selected.size === 1 ? "" : "s"}`;
  }

  function clearSelection() {
    selected.clear();
    showSelection();
    find();
  }

  document.getElementById("select-all").addEventListener("click", () => {
    found.forEach((result) => selected.add(result));
    showSelection();
    find();
  });
  document.getElementById("select-none").addEventListener("click", clearSelection);
  for (const [id, choice] of [["approve-many", "approved"], ["reject-many", "rejected"]]) {
    document.getElementById(id).addEventListener("click", () => { choices.set(selected, choice); clearSelection(); });
  }
  askMany.addEventListener("submit", (event) => {
    event.preventDefault();
    const number = choices.ask(selected, askMany.elements.prompt.value);
    diffcolor.notice(`${number} new requests: save them under Choices.`);
    askMany.reset();
    clearSelection();
  });

  // ---------------------------------------------------------------- the address

  let wantedRun = "";
  function open(parameters) {
    for (const name of fields) form.elements[name].value = parameters.get(name) ?? "";
    wantedRun = parameters.get("run") ?? "";
    find();
  }

  function changed() {
    wantedRun = "";
    history.replaceState(null, "", address({ view: "gallery", ...asked() }));
    find();
  }
  let typed = null;
  form.addEventListener("input", () => { clearTimeout(typed); typed = setTimeout(changed, 120); });
  form.addEventListener("submit", (event) => { event.preventDefault(); changed(); });

  return {
    open, find,
    get address() { return address({ view: "gallery", ...asked() }); },
    neighbours(image) { // the images before and after this one, in the order of the gallery
      const order = [...new Set(found.map((result) => result.image))];
      const place = order.indexOf(image);
      return place < 0 ? null : { before: order[place - 1], after: order[place + 1], place: place + 1, number: order.length };
    },
  };
})();
