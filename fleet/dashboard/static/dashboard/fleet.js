// Tells the server the viewer's time zone (see dashboard/middleware.py), and copies commands and tokens.
(() => {
  const zone = Intl.DateTimeFormat().resolvedOptions().timeZone;
  if (zone && !document.cookie.includes(`fleet-zone=${encodeURIComponent(zone)}`)) {
    document.cookie = `fleet-zone=${encodeURIComponent(zone)};path=/;max-age=31536000;samesite=lax`;
  }
  document.addEventListener("click", async (event) => {
    const button = event.target.closest("[data-copy]");
    if (!button) return;
    const source = document.getElementById(button.dataset.copy);
    try {
      await navigator.clipboard.writeText(source.textContent.trim());
      button.dataset.done = "1";
      setTimeout(() => delete button.dataset.done, 1500);
    } catch {
      getSelection().selectAllChildren(source); // no clipboard without TLS: select it, so that one key copies
    }
  });
})();
