// Renews the page while runs go on. What is open, chosen and scrolled to stays as it is.
const PAUSE = 2000; // milliseconds
let version = "";

const named = (element) => `${element.closest("[id]")?.id} ${element.querySelector("summary").textContent}`;

function replace(fresh) {
  const open = new Set([...document.querySelectorAll("details[open]")].map(named));
  const chosen = [...document.querySelectorAll("input:checked")].map((input) => [input.name, input.value]);
  for (const part of ["style", "header", "main"]) {
    document.querySelector(part).replaceWith(fresh.querySelector(part));
  }
  for (const details of document.querySelectorAll("details")) details.open = open.has(named(details));
  for (const [name, value] of chosen) {
    const input = [...document.getElementsByName(name)].find((found) => found.value === value);
    if (input) input.checked = true;
  }
}

async function renew() {
  const state = document.querySelector("#watch");
  try {
    const answer = await fetch("/", { cache: "no-store", headers: { "If-None-Match": version } });
    if (answer.status === 200) {
      replace(new DOMParser().parseFromString(await answer.text(), "text/html"));
      version = answer.headers.get("ETag");
    }
    state.textContent = answer.ok || answer.status === 304 ? "" : await answer.text();
  } catch {
    state.textContent = "The command has ended: this is the last page that it showed.";
  }
  setTimeout(renew, PAUSE);
}

setTimeout(renew, PAUSE);
