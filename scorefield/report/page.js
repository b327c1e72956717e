"use strict";
// Without this the page shows all pictures of a slider in a row, and the first frame of a turntable.
for (const box of document.querySelectorAll(".slider")) {
  const frames = [...box.querySelectorAll("figure")];
  const range = box.querySelector("input");
  const show = () => frames.forEach((frame, i) => { frame.hidden = i !== Number(range.value); });
  range.addEventListener("input", show);
  range.hidden = false;
  show();
}
for (const box of document.querySelectorAll(".turntable")) {
  const image = box.querySelector("img");
  const range = box.querySelector("input");
  const frames = Number(box.dataset.frames);
  const show = () => { image.style.transform = `translateX(${-100 * Number(range.value) / frames}%)`; };
  let start = null;
  box.querySelector(".window").addEventListener("pointerdown", (event) => {
    start = { x: event.clientX, frame: Number(range.value) };
    event.currentTarget.setPointerCapture(event.pointerId);
  });
  box.querySelector(".window").addEventListener("pointermove", (event) => {
    if (start === null) return;
    const turned = Math.round((event.clientX - start.x) / event.currentTarget.clientWidth * frames);
    range.value = ((start.frame - turned) % frames + frames) % frames;
    show();
  });
  for (const end of ["pointerup", "pointercancel"]) {
    box.querySelector(".window").addEventListener(end, () => { start = null; });
  }
  range.addEventListener("input", show);
  range.hidden = false;
}
