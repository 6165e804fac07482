// ipywidgets 8 calls MathJax.Hub.Queue, which MathJax 3 no longer has.
document.addEventListener("DOMContentLoaded", () => {
  const M = window.MathJax;
  if (M && !M.Hub) {
    M.Hub = { Queue: (c) => M.typesetPromise && M.typesetPromise([c[2]]) };
  }
});

// For screen readers: slider handles and the images inside widgets come without a name,
// and the value of a handle is the number of the option, not what the option says.
const nameWidgets = () => {
  const handles = ".widget-slider .noUi-handle:not([aria-label])";
  document.querySelectorAll(handles).forEach((handle) => {
    const label = handle.closest(".widget-slider").querySelector(".widget-label");
    handle.setAttribute("aria-label", (label && label.textContent) || "slider");
  });
  document.querySelectorAll(".widget-slider .noUi-handle").forEach((handle) => {
    const readout = handle.closest(".widget-slider").querySelector(".widget-readout");
    if (readout) handle.setAttribute("aria-valuetext", readout.textContent);
  });
  document.querySelectorAll(".jupyter-widgets img:not([alt])").forEach((image) => {
    image.setAttribute("alt", "plot for the chosen setting");
  });
};
new MutationObserver(nameWidgets).observe(document.documentElement, {
  childList: true,
  subtree: true,
});
