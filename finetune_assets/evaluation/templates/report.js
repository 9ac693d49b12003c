// Search in the samples; without it every sample is shown.
(() => {
  const box = document.getElementById("find"), told = document.getElementById("found");
  if (!box) return;
  const samples = [...document.querySelectorAll(".sample")];
  const plain = (text) => text.normalize("NFD").replace(/[\u0300-\u036f]/g, "").toLowerCase();
  const texts = samples.map((sample) => plain(sample.textContent));
  box.parentElement.hidden = false;
  box.addEventListener("input", () => {
    const words = plain(box.value).split(/\s+/).filter(Boolean);
    let shown = 0;
    samples.forEach((sample, n) => {
      const fits = words.every((word) => texts[n].includes(word));
      sample.hidden = !fits;
      shown += fits;
    });
    document.querySelectorAll(".group").forEach((group) => { group.hidden = !group.querySelector(".sample:not([hidden])"); });
    told.textContent = words.length ? told.dataset.text.replace("{n}", shown).replace("{total}", samples.length) : "";
  });
})();
