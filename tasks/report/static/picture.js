"use strict";
// The page of one image: its pictures compared, its words, choices and all that the manifest knows.

diffcolor.picture = (() => {
  const { el, images, address, choices, setting } = diffcolor;
  const by = (id) => document.getElementById(id);
  const stage = by("stage");
  let image = null;
  let records = [];
  let chosen = 0; // number of the result that the page is about
  let pictures = []; // [{name, view, label}] that can be compared

  async function open(parameters, isCurrent) {
    const wanted = images.get(parameters.get("image"));
    if (!wanted) return false;
    const found = await diffcolor.details(wanted);
    if (!isCurrent()) return true; // another view has been opened meanwhile
    image = wanted;
    records = found;
    chosen = Math.max(0, image.results.findIndex((result) => result.variant === parameters.get("variant")));
    by("picture-title").textContent = image.key;
    document.title = `${image.key} · DiffColor report`;
    fillPictures();
    drawStage();
    drawVariants();
    drawFacts();
    drawAsk();
    drawNeighbours();
    return true;
  }

  function drawNeighbours() {
    by("back").href = diffcolor.gallery.address;
    const near = diffcolor.gallery.neighbours(image);
    by("place").textContent = near ? `${near.place} of ${near.number}` : "";
    for (const [id, other] of [["previous", near?.before], ["next", near?.after]]) {
      by(id).hidden = !other;
      if (other) by(id).href = address({ view: "picture", image: other.key });
    }
  }

  // ---------------------------------------------------------------- comparing

  function fillPictures() {
    const seen = new Set();
    pictures = [];
    const add = (label, shown) => {
      if (shown && !seen.has(shown.view)) pictures.push({ label, view: shown.view });
      if (shown) seen.add(shown.view);
    };
    const order = [chosen, ...records.keys()];
    for (const i of order) add("scan", records[i].pictures.scan);
    for (const i of order) add("primary", records[i].pictures.primary);
    for (const i of order) add(image.results[i].target_prompt ?? "primary", records[i].pictures.output);
    const own = records[chosen].pictures.output;
    const last = Math.max(0, pictures.findIndex((p) => p.view === own?.view));
    for (const [id, value] of [["left", 0], ["right", last]]) {
      by(id).replaceChildren(...pictures.map((p, i) => el("option", { value: i }, p.label)));
      by(id).value = value;
    }
  }

  function frame(...shown) {
    const box = el("div", { class: "frame" });
    const width = image.width ?? 1;
    const height = image.height ?? 1;
    box.style.aspectRatio = `${width} / ${height}`;
    box.style.width = by("actual").checked ? `${width / devicePixelRatio}px` : `min(100%, ${(72 * width) / height}vh)`;
    for (const p of shown) box.append(el("img", { src: p.view, alt: p.label, draggable: "false" }));
    return box;
  }

  function drawStage() {
    const left = pictures[by("left").value];
    const right = pictures[by("right").value];
    stage.className = by("actual").checked ? "stage actual" : "stage";
    if (!left) {
      stage.replaceChildren(el("p", { class: "quiet" }, "There is no picture to show."));
      return;
    }
    if (document.querySelector("input[name=mode]:checked").value === "beside") {
      const panes = [left, right].map((p) => el("figure", { class: "pane" },
        el("div", { class: "scroller", tabindex: "0", role: "region", "aria-label": p.label }, frame(p)),
        el("figcaption", {}, p.label)));
      const [a, b] = panes.map((pane) => pane.firstChild);
      for (const [from, to] of [[a, b], [b, a]]) {
        from.addEventListener("scroll", () => { to.scrollTop = from.scrollTop; to.scrollLeft = from.scrollLeft; });
      }
      stage.replaceChildren(el("div", { class: "beside" }, ...panes));
      return;
    }
    const box = frame(right, left);
    const split = el("input", {
      type: "range", min: 0, max: 100, value: 50, id: "split", "aria-label": "Where the left picture ends, in percent",
      oninput: () => box.style.setProperty("--split", `${split.value}%`),
    });
    box.classList.add("split");
    box.style.setProperty("--split", "50%");
    box.append(split, el("span", { class: "handle" }));
    stage.replaceChildren(el("div", { class: "scroller" }, box),
      el("p", { class: "ends" }, el("span", {}, left.label), el("span", {}, right.label)));
  }

  for (const id of ["left", "right", "actual"]) by(id).addEventListener("change", drawStage);
  document.querySelectorAll("input[name=mode]").forEach((radio) => radio.addEventListener("change", drawStage));

  // ---------------------------------------------------------------- words

  const verdict = (noun) => (!noun.feasible ? "infeasible" : noun.agreement >= 0.5 ? "obeyed" : "missed");
  const VERDICTS = { obeyed: "obeyed", missed: "not obeyed", infeasible: "cannot be shown at this brightness" };

  // The prompt, with its colour words marked as obeyed, not obeyed or impossible.
  function marked(prompt, nouns) {
    const pieces = [];
    let rest = prompt;
    const quoted = (word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
    for (const noun of nouns ?? []) {
      const match = new RegExp(`\\b${quoted(noun.color)}\\b(?=.*\\b${quoted(noun.noun)}\\b)`, "i").exec(rest);
      if (!match) continue;
      const kind = verdict(noun);
      pieces.push(rest.slice(0, match.index), el("mark", { class: kind, title: VERDICTS[kind] }, match[0],
        kind === "obeyed" ? null : el("span", { class: "unseen" }, ` (${VERDICTS[kind]})`)));
      rest = rest.slice(match.index + match[0].length);
    }
    return [...pieces, rest];
  }

  function wordTable(nouns) {
    if (!nouns?.length) return null;
    const rows = nouns.map((noun) => {
      const swatch = el("span", { class: "swatch", "aria-hidden": "true" });
      if (CSS.supports("color", noun.color)) swatch.style.background = noun.color;
      const kind = verdict(noun);
      return el("tr", {}, el("td", {}, swatch, `${noun.color} ${noun.noun}`),
        el("td", {}, el("mark", { class: kind }, VERDICTS[kind])),
        el("td", { class: "n" }, number(noun.agreement, 2)), el("td", { class: "n" }, number(noun.achievable_chroma, 0)));
    });
    const head = ["word", "", "agreement", "chroma that sRGB can show"].map((name, i) =>
      el("th", { scope: "col", class: i > 1 ? "n" : null }, name || el("span", { class: "unseen" }, "verdict")));
    return el("table", {}, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows));
  }

  // ---------------------------------------------------------------- results and choices

  function drawVariants() {
    by("variants").replaceChildren(...image.results.map((result, i) => {
      const record = records[i];
      const choice = choices.of(result);
      const primary = record.context_is_generic ? "primary: nobody has said what is in it" : `primary: ${result.context_prompt ?? ""}`;
      const shown = record.pictures.output ?? record.pictures.scan;
      const item = el("li", { class: i === chosen ? "variant current" : "variant" },
        shown ? el("img", { src: shown.thumb, alt: "", loading: "lazy" }) : el("span", { class: "none" }, "no picture"),
        el("div", {},
          el("p", { class: "prompt" }, el("a", {
            href: address({ view: "picture", image: image.key, variant: result.variant }), "aria-current": i === chosen ? "true" : null,
          }, ...(result.target_prompt ? marked(result.target_prompt, record.nouns) : [primary]))),
          result.status === "ok" ? null : el("p", {}, el("span", { class: `badge ${result.status}` }, result.status),
            ` ${result.error_class}: ${record.error_message}`)));
      if (result.status === "ok") {
        const button = (label, value) => el("button", {
          type: "button", class: value, "aria-pressed": choice?.choice === value ? "true" : "false",
          onclick: () => mark(i, value),
        }, label);
        const note = el("input", {
          value: choice?.note ?? "", maxlength: 4000, placeholder: "note", "aria-label": "Note", disabled: choice === null,
          onchange: (event) => choices.note(result, event.target.value),
        });
        item.lastChild.append(el("p", { class: "buttons" }, button("Approve", "approved"), button("Reject", "rejected"), note,
          choice?.saved ? el("span", { class: "quiet" }, `in the manifest${record.choice_by ? ` by ${record.choice_by}` : ""}`) : null));
      }
      return item;
    }));
  }

  function mark(i, value) {
    const result = image.results[i];
    const now = choices.of(result);
    choices.set([result], now && !now.saved && now.choice === value ? null : value);
    const place = value === "approved" ? 0 : 1;
    drawVariants();
    by("variants").children[i].querySelectorAll("button")[place].focus();
  }

  document.addEventListener("keydown", (event) => {
    if (by("picture").hidden || event.target.closest("input, textarea, select") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "a" || event.key === "r") {
      if (image?.results[chosen].status === "ok") mark(chosen, event.key === "a" ? "approved" : "rejected");
    } else if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      const link = by(event.key === "ArrowLeft" ? "previous" : "next");
      if (!link.hidden && !event.target.closest(".scroller, .stage")) location.hash = new URL(link.href).hash;
    }
  });

  // ---------------------------------------------------------------- other colours

  const ask = by("ask-one");

  function drawAsk() {
    const { target_prompt, context_prompt } = image.results[chosen];
    ask.elements.prompt.value = target_prompt ?? (records[chosen].context_is_generic ? "" : context_prompt) ?? "";
    by("asked").textContent = "";
    drawHints();
  }

  const colors = setting.colors;
  const COLOR = `#[0-9a-f]{6}|(?:${Object.keys(colors.hues).join("|")})\\b`;
  const BETWEEN = "(?:\\s+(?!(?:an?|the|and|or|with|on|in|under|over|of|by|at)\\b)[\\w-]+){0,2}"; // "red brick house"

  // The hue of a colour in CIELAB, in degrees; null for a neutral one.
  function hueOf(color) {
    if (color in colors.hues) return colors.hues[color];
    const [r, g, b] = [1, 3, 5].map((at) => parseInt(color.slice(at, at + 2), 16) / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    const [fx, fy, fz] = [ // XYZ by D65's white
      0.433953 * r + 0.376219 * g + 0.189828 * b, 0.212671 * r + 0.71516 * g + 0.072169 * b, 0.017758 * r + 0.109477 * g + 0.872765 * b,
    ].map((t) => (t > 216 / 24389 ? Math.cbrt(t) : ((24389 / 27) * t + 16) / 116));
    const [aStar, bStar] = [500 * (fx - fy), 200 * (fy - fz)];
    return Math.hypot(aStar, bStar) > 5 ? ((Math.atan2(bStar, aStar) * 180) / Math.PI + 360) % 360 : null;
  }

  function showable(color, lightness) {
    const hue = hueOf(color);
    if (hue === null) return true;
    const row = colors.chroma[Math.round(lightness / colors.lightness_step)];
    return row[Math.round(hue / colors.hue_step) % row.length] >= colors.full_chroma;
  }

  // What is known of the words typed: from every result of this image, and from what its nouns' brightness can show.
  function drawHints() {
    const typed = ask.elements.prompt.value.toLowerCase();
    const hints = new Map();
    for (const record of records) {
      for (const [i, noun] of (record.nouns ?? []).entries()) {
        const lightness = record.noun_lightness?.[i] ?? null;
        if (lightness !== null && /^[\w-]+$/.test(noun.noun)) {
          for (const [, color] of typed.matchAll(new RegExp(`(?<![\\w#])(${COLOR})${BETWEEN}\\s+${noun.noun}\\b`, "g"))) {
            if (!showable(color, lightness)) hints.set(`${color} ${noun.noun}`, "infeasible");
          }
        }
        const kind = verdict(noun);
        const words = new RegExp(`\\b${noun.color}${BETWEEN}\\s+${noun.noun}\\b`);
        if (kind !== "obeyed" && /^[\w-]+$/.test(noun.color + noun.noun) && words.test(typed)) {
          hints.set(`${noun.color} ${noun.noun}`, kind);
        }
      }
    }
    by("hints").replaceChildren(...[...hints].map(([words, kind]) => el("li", {}, el("mark", { class: kind }, words),
      kind === "missed" ? " was not obeyed before: another colour, or plainer words, may be."
        : " cannot be shown at the brightness of the scan: a lighter or darker colour can.")));
  }

  ask.elements.prompt.addEventListener("input", drawHints);
  ask.addEventListener("submit", (event) => {
    event.preventDefault();
    const added = choices.ask([image.results[chosen]], ask.elements.prompt.value);
    by("asked").textContent = added ? "Noted: save it under Choices." : "This has been asked for already.";
  });

  // ---------------------------------------------------------------- everything else

  const number = (value, digits) => (value === null || value === undefined ? "–" : value.toFixed(digits));
  const bytes = (value) => (value === null || value === undefined ? null : value < 1e6 ? `${(value / 1e3).toFixed(0)} kB` : `${(value / 1e6).toFixed(1)} MB`);
  const seconds = (value) => (value === null || value === undefined ? null : `${value.toFixed(value < 10 ? 2 : 1)} s`);

  function drawFacts() {
    const result = image.results[chosen];
    const record = records[chosen];
    const file = (name, label) => (record.files[name] ? el("a", { href: record.files[name] }, label) : record[`${name}_uri`]);
    const groups = {
      Prompts: [["in the picture", record.context_is_generic ? null : result.context_prompt], ["asked for", result.target_prompt],
        ["rewritten", record.rewritten_prompt]],
      Measures: [["colourfulness", number(result.colorfulness, 1)], ["CLIP similarity", number(result.clip_similarity, 3)],
        ["mean |ΔL*|", number(result.mean_abs_delta_l, 3)], ["99% |ΔL*|", number(result.p99_abs_delta_l, 3)]],
      Time: [["stage 1", seconds(record.stage1_seconds)], ["stage 2", seconds(record.stage2_seconds)],
        ["sampling", seconds(record.sampling_seconds)], ["in all", seconds(result.total_seconds)],
        ["fit", record.fit_reused === null ? null : record.fit_reused ? "reused" : "made for this"]],
      Settings: [["model", record.model_id], ["revision", record.model_revision], ["seed", record.seed], ["alpha", record.alpha],
        ["configuration", record.config_sha256], ["reduced", record.fallback]],
      Catalog: image.columns,
      Scan: [["file", record.input_uri], ["SHA-256", record.input_sha256],
        ["size", image.width ? `${image.width} × ${image.height} px, ${record.bit_depth} bit, ${record.input_mode}` : null],
        ["pages left out", record.pages_left_out || null]],
      Files: [["picture", file("output", `picture, ${bytes(record.output_bytes) ?? ""}`)], ["access copy", file("access", "access copy")],
        ["primary", file("primary", "primary")], ["kept fit", record.fit_uri], ["SHA-256", result.output_sha256]],
      Provenance: [["run", result.run_id], ["attempt", record.attempt], ["adopted from", record.adopted_from],
        ["started", record.started_at], ["finished", result.finished_at], ["machine", record.node], ["device", record.device_name],
        ["peak memory", bytes(record.peak_memory_bytes)], ["software", record.software_version], ["variant", result.variant]],
    };
    const parts = [];
    const words = wordTable(record.nouns);
    if (words) parts.push(el("h2", {}, "Words"), el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Words" }, words));
    for (const [title, pairs] of Object.entries(groups)) {
      const known = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "" && value !== "–");
      if (known.length === 0) continue;
      parts.push(el("h2", {}, title), el("dl", { class: "facts" }, ...known.flatMap(([name, value]) => [
        el("dt", {}, name), el("dd", {}, typeof value === "object" ? value : String(value))])));
    }
    by("facts").replaceChildren(...parts);
  }

  choices.onchanged(() => { if (image) drawVariants(); });
  return { open };
})();
