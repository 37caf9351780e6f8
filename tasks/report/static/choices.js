"use strict";
// What a person chooses and asks for. It is kept in this browser, for this output, until it is saved as a file.
//
// A choice is about one picture with its very bytes: its name is image, variant and SHA-256. So a picture that was
// made anew has no choice yet.

diffcolor.choices = (() => {
  const { el, setting, images, results, address } = diffcolor;
  const place = (what) => `diffcolor:${what}:${setting.output}`;
  const listeners = [];
  let choices = read("choices", {}); // name -> {image, variant, sha256, choice, note}
  let requests = read("requests", []); // [{image, target_prompt, context_prompt}]

  function read(what, otherwise) {
    try {
      const kept = JSON.parse(localStorage.getItem(place(what)));
      return kept ?? otherwise;
    } catch {
      return otherwise;
    }
  }

  function keep() {
    try {
      localStorage.setItem(place("choices"), JSON.stringify(choices));
      localStorage.setItem(place("requests"), JSON.stringify(requests));
    } catch {
      diffcolor.notice("This browser keeps nothing for this page: save before you close it.");
    }
    count();
  }

  const name = (result) => JSON.stringify([result.image.key, result.variant, result.output_sha256]);

  // The choice about a result: this browser's, or else the one that is in the manifest already.
  function of(result) {
    const own = choices[name(result)];
    if (own) return { ...own, saved: false };
    return result.choice ? { choice: result.choice, note: result.choice_note ?? "", saved: true } : null;
  }

  function set(some, choice) { // choice: approved, rejected, or null to take it back
    for (const result of some) {
      if (result.status !== "ok") continue;
      if (choice === null) delete choices[name(result)];
      else {
        const note = of(result)?.note ?? "";
        choices[name(result)] = {
          image: result.image.key, variant: result.variant, sha256: result.output_sha256, choice, note,
        };
      }
    }
    keep();
  }

  function note(result, text) {
    const now = of(result);
    if (now === null) return;
    set([result], now.choice);
    choices[name(result)].note = text;
    keep();
  }

  function ask(some, prompt) { // how many requests are new: the same one twice would be refused
    const text = prompt.trim();
    const asked = new Set(requests.map((r) => JSON.stringify([r.image, r.target_prompt, r.context_prompt])));
    const before = requests.length;
    for (const result of some) {
      const request = { image: result.image.key, target_prompt: text, context_prompt: result.context_prompt ?? "" };
      const key = JSON.stringify(Object.values(request));
      if (!asked.has(key)) requests.push(request);
      asked.add(key);
    }
    keep();
    return requests.length - before;
  }

  // Choices about pictures that are still the same.
  function current() {
    const there = new Set(results.map(name));
    return Object.entries(choices).filter(([key]) => there.has(key)).map(([, choice]) => choice);
  }

  function file(who) {
    return JSON.stringify({ schema: 1, who, saved: new Date().toISOString(), choices: current() }, null, 1);
  }

  function catalog() {
    const quoted = (text) => `"${text.replaceAll('"', '""')}"`;
    const lines = requests.map((r) => [r.image, r.target_prompt, r.context_prompt].map(quoted).join(","));
    return ["image,target_prompt,context_prompt", ...lines].join("\r\n") + "\r\n";
  }

  function save(filename, text, type) {
    const url = URL.createObjectURL(new Blob([text], { type }));
    el("a", { href: url, download: filename }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  }

  // ---------------------------------------------------------------- the view

  const saveChoices = document.getElementById("save-choices");
  const saveRequests = document.getElementById("save-requests");

  saveChoices.addEventListener("submit", (event) => {
    event.preventDefault();
    const who = saveChoices.elements.who.value.trim();
    try {
      localStorage.setItem(place("who"), JSON.stringify(who));
    } catch { /* `keep` has said it */ }
    save("choices.json", file(who), "application/json");
  });

  saveRequests.addEventListener("submit", (event) => {
    event.preventDefault();
    save("recolor.csv", catalog(), "text/csv");
  });

  function pictureLink(key, variant) {
    return el("a", { href: address({ view: "picture", image: key, variant }) }, key);
  }

  function show() {
    const chosen = current();
    const stale = Object.keys(choices).length - chosen.length;
    const who = saveChoices.elements.who;
    if (!who.value) who.value = read("who", "");
    saveChoices.querySelector("button").disabled = chosen.length === 0 || !diffcolor.loaded;
    saveRequests.querySelector("button").disabled = requests.length === 0;
    const lines = chosen.slice(0, 500).map((choice) => {
      const result = images.get(choice.image).results.find((r) => r.variant === choice.variant);
      return el("li", {},
        el("span", { class: `badge ${choice.choice}` }, choice.choice),
        el("span", { class: "grow" }, pictureLink(choice.image, choice.variant), ` ${result.target_prompt ?? "primary"}`,
          choice.note ? el("em", {}, ` ${choice.note}`) : null),
        el("button", { type: "button", class: "plain", onclick: () => { set([result], null); show(); } }, "Take back"));
    });
    if (chosen.length > 500) lines.push(el("li", {}, `and ${chosen.length - 500} more`));
    if (chosen.length === 0) lines.push(el("li", { class: "quiet" }, "Nothing yet: approve or reject results on their pages."));
    if (stale && diffcolor.loaded) lines.push(el("li", { class: "quiet" }, `${stale} choices are left out: their pictures have been made anew.`));
    document.getElementById("choice-list").replaceChildren(...lines);
    const asked = requests.slice(0, 500).map((request, i) => el("li", {},
      el("span", { class: "grow" }, images.has(request.image) ? pictureLink(request.image) : request.image, ` ${request.target_prompt}`),
      el("button", { type: "button", class: "plain", onclick: () => { requests.splice(i, 1); keep(); show(); } }, "Take back")));
    if (requests.length > 500) asked.push(el("li", {}, `and ${requests.length - 500} more`));
    if (requests.length === 0) asked.push(el("li", { class: "quiet" }, "Nothing yet: type other colours on a picture's page, or for several in the gallery."));
    document.getElementById("request-list").replaceChildren(...asked);
  }

  function count() {
    const number = Object.keys(choices).length + requests.length;
    document.getElementById("num-choices").textContent = number || "";
  }

  count();
  addEventListener("storage", () => { // another tab has chosen
    choices = read("choices", {});
    requests = read("requests", []);
    count();
    listeners.forEach((listener) => listener());
  });

  return { of, set, note, ask, show, onchanged: (listener) => listeners.push(listener) };
})();
