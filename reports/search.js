// Shows the parts of the page that hold all the words typed; a link with #q=words does the same.
const input = document.getElementById("search");
if (input) {
  const parts = [...document.querySelectorAll("[data-find]")];
  const texts = parts.map((part) => part.textContent.toLowerCase());
  const find = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    parts.forEach((part, n) => { part.hidden = !words.every((word) => texts[n].includes(word)); });
    const shown = parts.filter((part) => !part.hidden).length;
    document.getElementById("found").textContent = words.length ? `${shown} of ${parts.length}` : "";
    history.replaceState(null, "", words.length ? "#q=" + encodeURIComponent(words.join(" ")) : "#");
  };
  input.form.hidden = false;
  input.form.addEventListener("submit", (event) => event.preventDefault());
  input.addEventListener("input", find);
  if (location.hash.startsWith("#q=")) {
    input.value = decodeURIComponent(location.hash.slice(3));
    find();
  }
}
