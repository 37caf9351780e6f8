"use strict";
// Which view is shown: the address after the "#" says it.

(() => {
  const views = ["overview", "gallery", "picture", "choices"];
  const title = document.title;
  let waitsForRows = false;

  diffcolor.notice = (message) => {
    const notice = document.getElementById("notice");
    notice.textContent = message;
    notice.hidden = !message;
  };

  async function route(event) {
    const hash = location.hash.slice(1);
    if (hash && !hash.includes("=")) return; // the skip link
    const parameters = new URLSearchParams(hash);
    const view = views.includes(parameters.get("view")) ? parameters.get("view") : "overview";
    if (event) diffcolor.notice("");
    document.title = title;
    waitsForRows = false;
    if (view === "picture") {
      const isCurrent = () => location.hash.slice(1) === hash;
      try {
        waitsForRows = !(await diffcolor.picture.open(parameters, isCurrent));
      } catch (error) {
        diffcolor.notice(error.message);
        return;
      }
      if (!isCurrent()) return;
      if (waitsForRows && diffcolor.loaded) {
        diffcolor.notice(`This report has no image ${parameters.get("image")}.`);
        return;
      }
    }
    if (waitsForRows) return;
    for (const name of views) document.getElementById(name).hidden = name !== view;
    for (const link of document.querySelectorAll("nav a")) {
      const here = new URLSearchParams(new URL(link.href).hash.slice(1)).get("view");
      if (here === view) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
    }
    if (view === "gallery") diffcolor.gallery.open(parameters);
    if (view === "choices") diffcolor.choices.show();
    if (event) {
      scrollTo(0, 0);
      document.getElementById("main").focus({ preventScroll: true });
    }
  }

  addEventListener("hashchange", route);
  const isShown = (view) => !document.getElementById(view).hidden;
  diffcolor.onrows(() => {
    if (waitsForRows) route(null);
    if (isShown("gallery")) diffcolor.gallery.find({ keep: true });
    if (isShown("choices")) diffcolor.choices.show();
  });
  diffcolor.choices.onchanged(() => { // by another tab
    if (isShown("gallery")) diffcolor.gallery.find();
    if (isShown("choices")) diffcolor.choices.show();
  });
  route(null);
  diffcolor.loadAll().catch((error) => diffcolor.notice(error.message));
})();
