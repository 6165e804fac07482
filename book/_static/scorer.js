// The order of what a search finds: pages that explain come before lists of names.
var Scorer = {
  score: ([page, , , , score]) => {
    if (/\d\d_|glossary|notation|intro/.test(page)) return score + 20;
    return /references|status/.test(page) ? score - 20 : score;
  },
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
