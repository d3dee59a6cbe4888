// Labels by the keyboard. With more than two answers, keys 1, 2, … rank them from the best to the worst.
const form = document.getElementById("label");
const count = Number(form?.dataset.count ?? 0);
let groups = []; // places of the answers, the best group first
let tied = false; // whether the next answer is as good as the last one

// The ranking so far. Once one answer is left, it is the last.
function complete() {
  const left = [...Array(count).keys()].filter((place) => !groups.flat().includes(place));
  if (left.length > 1) return null;
  if (!left.length) return groups;
  return tied ? [...groups.slice(0, -1), [...groups.at(-1), ...left]] : [...groups, left];
}

function show() {
  const ranked = groups.flat();
  for (const output of form.querySelectorAll("output.rank")) {
    const rank = groups.findIndex((group) => group.includes(Number(output.dataset.place)));
    output.textContent = rank < 0 ? "" : `rank ${rank + 1}`;
  }
  for (const button of form.querySelectorAll("button[data-place]")) {
    button.disabled = ranked.includes(Number(button.dataset.place));
  }
  const submit = document.getElementById("submit");
  const ranking = complete();
  submit.value = ranking ? ranking.map((group) => group.join(",")).join(" ") : "";
  submit.disabled = !ranking;
  document.getElementById("tie").setAttribute("aria-pressed", String(tied));
}

function rank(place) {
  if (tied && groups.length) groups.at(-1).push(place);
  else groups.push([place]);
  tied = false;
  show();
}

if (count > 2) {
  form.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button?.dataset.place !== undefined) rank(Number(button.dataset.place));
    else if (button?.id === "tie") {
      tied = !tied && groups.length > 0;
      show();
    } else if (button?.id === "clear") {
      groups = [];
      tied = false;
      show();
    }
  });
  show();
}

form?.addEventListener("submit", (event) => {
  if (form.dataset.sent) event.preventDefault(); // a second press of the key is not for the next item
  form.dataset.sent = "yes";
});

document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return; // a held key is not for the next item
  if (event.target.matches("input[name=reason]")) {
    if (event.key !== "Enter") return;
    event.preventDefault(); // else the browser presses the first button: a verdict
    form.querySelector("button[value=flag]").click();
    return;
  }
  if (event.key === "Enter" && event.target.matches("button, a, summary")) return;
  const button = form && [...form.querySelectorAll("button[data-key]")].find((each) => each.dataset.key === event.key);
  if (!button || button.disabled) return;
  event.preventDefault();
  button.click();
});
