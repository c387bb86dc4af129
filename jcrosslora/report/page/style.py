"""The style sheet of the page: light or dark as the reader's system is, one column on a phone, light in print."""

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --card: #f6f7f9; --ink: #1d2430; --muted: #5b6573; --line: #c9ced6;
  --base: #8a93a1; --moved: #2f62c9; --trained: #2f8a57; --other: #b9a3c9; --left: #cf7a16;
  --good: #1b6e20; --mixed: #8a5200; --bad: #b3261e; --open: #3a5a9b; }
@media (prefers-color-scheme: dark) { :root { --page: #14171c; --card: #1d2128; --ink: #e8ecf3; --muted: #a6b0bd;
  --line: #454d59; --base: #8b95a3; --moved: #7aa2f7; --trained: #6cc492; --other: #b79fcb; --left: #e9a04c;
  --good: #81c784; --mixed: #ffb74d; --bad: #f28b82; --open: #9db8f2; } }
@media print { :root { color-scheme: light; --page: #ffffff; --card: #ffffff; --ink: #000000; --muted: #444444;
  --line: #bbbbbb; --base: #8a93a1; --moved: #2f62c9; --trained: #2f8a57; --other: #b9a3c9; --left: #cf7a16;
  --good: #1b6e20; --mixed: #8a5200; --bad: #b3261e; --open: #3a5a9b; }
  section, .example { break-inside: avoid; } main { max-width: none; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .5rem; }
p, ul, dl { margin: .4rem 0; }
.muted, figcaption, dt { color: var(--muted); }
.verdict { border-left: .4rem solid var(--tone); background: var(--card); padding: .8rem 1rem; margin: 1rem 0; }
.verdict p { font-size: 1.1rem; }
.verdict b { color: var(--tone); }
.good { --tone: var(--good); } .mixed { --tone: var(--mixed); } .bad { --tone: var(--bad); }
.open { --tone: var(--open); }
.grid { display: grid; gap: 1.5rem 2.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
section, .grid { margin: 1.8rem 0; min-width: 0; }
.grid section { margin: 0; }
figure { margin: 0; display: grid; gap: .5rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); align-items: center; }
figure svg { width: 100%; max-width: 36rem; height: auto; display: block; }
svg text { font-family: inherit !important; }
figcaption { font-size: .9rem; }
figcaption > div { padding-left: 1.1em; text-indent: -1.1em; }
.key { text-indent: 0; display: inline-block; width: .8em; height: .8em; border-radius: .2em; margin-right: .3em; }
.example { background: var(--card); padding: .7rem 1rem; margin: .8rem 0; }
.texts { display: grid; gap: .5rem 1.2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 13rem), 1fr)); }
.texts:first-child { margin-bottom: .5rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; max-height: 14rem; overflow-y: auto; }
li.text { max-height: none; overflow: visible; margin: .7rem 0; }
.mark { border: 1px solid; border-radius: .3rem; padding: 0 .4rem; font-size: .8rem; white-space: nowrap; }
.right { color: var(--good); } .cut { color: var(--mixed); }
pre, .wide { overflow-x: auto; } pre { background: var(--card); padding: .8rem; font-size: .85rem; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .2rem 1rem; } dd { margin: 0;
  overflow-wrap: anywhere; }
@media print { .text { max-height: none; overflow: visible; } pre { white-space: pre-wrap; } }
"""
# A page that was made of texts of others loads nothing and runs nothing.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
