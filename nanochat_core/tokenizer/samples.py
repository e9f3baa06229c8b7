"""Short texts of our own, of kinds that a tokenizer meets: `tokenizer_eval` adds the shards."""

NEWS = """\
The harbour town of Ellerby will have a ferry again. After four years in which the only way across the \
estuary was a forty-minute drive, the regional council voted on Tuesday evening, by eleven to six, to \
pay for two electric boats and a new landing stage on the eastern shore. Work is to begin in March and \
should be finished "before the summer visitors arrive," said the council's transport officer, Maren \
Oduya, though she admitted that the same words had been used about the previous project.

The old service ended in the storm of November 2021, when the larger of its two diesel ferries broke \
loose and sank beside the fish market. Insurance covered barely a third of the $4.2 million that a \
replacement would have cost, and the operator, a family firm founded in 1936, closed soon afterwards. \
Since then shops on the eastern side report that trade has fallen by 18 per cent, and the primary school \
there has lost nearly a quarter of its pupils.

Not everyone is pleased. "We asked for a bridge," said Tomas Weller, who runs a bakery near the quay and \
who collected 2,300 signatures last year. "A ferry stops when the wind blows. A bridge doesn't." \
Engineers engaged by the council put the price of a bridge at more than thirty times that of the boats, \
not counting the dredging that shipping would need. Ms Oduya said that the question could be raised \
again in ten years' time, "when we know how many people really want to cross."

The boats, each carrying 60 passengers and eight bicycles, will be charged overnight from the town's own \
solar roof. A single ticket is expected to cost $2.50; children under twelve travel free.
"""

KOREAN = """\
할머니 댁 뒤뜰에는 오래된 감나무가 한 그루 있었다. 가을이 되면 동네 아이들이 모두 그 나무 아래로 \
모여들었고, 할머니는 긴 장대로 감을 하나씩 따서 바구니에 담아 주셨다. 우리는 아직 떫은 감을 한입 베어 \
물고는 얼굴을 찡그리며 서로를 보고 웃었다.

몇 해 전 그 집은 팔렸고, 새 주인은 마당에 주차장을 만들려고 했다. 그런데 공사를 시작하던 날 아침, \
이웃들이 하나둘 찾아와 나무만은 남겨 달라고 부탁했다고 한다. 결국 주차장은 반으로 줄었고 감나무는 그 자리에 \
그대로 서 있다. 지난 주말에 나는 아이를 데리고 그곳에 다녀왔다. "엄마, 이 나무는 몇 살이야?" 하고 \
아이가 물었다. 나는 대답 대신 가장 낮은 가지에 달린 감을 하나 따서 아이의 손에 쥐여 주었다. 2024년의 \
가을도 그렇게 지나가고 있었다.
"""

CODE = '''\
from __future__ import annotations

import heapq
from collections import defaultdict
from dataclasses import dataclass, field


@dataclass(order=True)
class Visit:
    """A place in the queue: the cheapest known way to a node."""

    cost: float
    node: str = field(compare=False)
    path: tuple[str, ...] = field(compare=False, default=())


class RoadMap:
    def __init__(self, roads: list[tuple[str, str, float]]) -> None:
        self._neighbours: dict[str, dict[str, float]] = defaultdict(dict)
        for a, b, length in roads:
            if length < 0:
                raise ValueError(f"road {a!r} -> {b!r} has negative length {length}")
            self._neighbours[a][b] = min(length, self._neighbours[a].get(b, float("inf")))
            self._neighbours[b][a] = self._neighbours[a][b]

    def shortest(self, start: str, goal: str) -> Visit | None:
        queue, seen = [Visit(0.0, start, (start,))], set()
        while queue:
            here = heapq.heappop(queue)
            if here.node == goal:
                return here
            if here.node in seen:
                continue
            seen.add(here.node)
            for other, length in self._neighbours[here.node].items():
                if other not in seen:
                    heapq.heappush(queue, Visit(here.cost + length, other, (*here.path, other)))
        return None


if __name__ == "__main__":
    roads = RoadMap([("A", "B", 7), ("A", "C", 9), ("B", "D", 15.5), ("C", "D", 11), ("D", "E", 6)])
    print(roads.shortest("A", "E"))  # Visit(cost=26.0, node='E', path=('A', 'C', 'D', 'E'))
'''

MATHS = r"""
\begin{theorem}[Sums of odd numbers]
For every integer $n \ge 1$ we have
\[
  \sum_{k=1}^{n} (2k - 1) \;=\; n^2 .
\]
\end{theorem}
\begin{proof}
By induction on $n$. For $n = 1$ both sides equal $1$. Suppose the claim holds for some
$n \ge 1$. Then
\begin{align*}
  \sum_{k=1}^{n+1} (2k-1) &= \left( \sum_{k=1}^{n} (2k-1) \right) + (2n + 1) \\
                          &= n^2 + 2n + 1 = (n+1)^2 . \qedhere
\end{align*}
\end{proof}

\begin{lemma}
Let $f \colon [a,b] \to \mathbb{R}$ be continuous, differentiable on $(a,b)$, and let $|f'(x)| \le
M$ there. Then
$|f(x) - f(y)| \le M\,|x-y|$ for all $x, y \in [a,b]$.
\end{lemma}
\begin{proof}
If $x = y$ there is nothing to show. Otherwise the mean value theorem gives a $\xi$ strictly
between them such that
$f(x) - f(y) = f'(\xi)\,(x-y)$; take absolute values.
\end{proof}

\noindent\textbf{Exercise 3.} Show that $\lim_{n \to \infty} \sqrt[n]{n} = 1$, and evaluate
$\int_0^{\pi/2} \sin^4 \theta \, d\theta = \frac{3\pi}{16} \approx 0.589$. Hint: write $n^{1/n} = 1
+ \varepsilon_n$
and compare $n = (1+\varepsilon_n)^n \ge \binom{n}{2} \varepsilon_n^2$ for $n \ge 2$.
"""

SCIENCE = """\
Lichens look like single organisms but are partnerships. A fungus provides the body: a mesh of fine \
threads, called hyphae, that anchors the lichen to bark or bare rock and holds on to water. Living \
inside that mesh are green algae or cyanobacteria, which photosynthesise and share the resulting \
carbohydrates with their host. Where the photobiont is a cyanobacterium it can also fix atmospheric \
nitrogen, so that the pair can colonise surfaces on which almost nothing else would grow.

Because lichens have no roots and no waxy cuticle, they take up water and dissolved minerals directly \
from the air and the rain, together with whatever pollutants these contain. Sulphur dioxide is \
especially harmful: at concentrations above roughly 30 micrograms per cubic metre it damages \
chlorophyll, and sensitive species disappear. Ecologists therefore use the number and kind of lichens on \
tree trunks as an inexpensive measure of air quality. In many European cities species that had been \
absent for a century returned within two decades of the first controls on emissions, although ammonia \
from agriculture now favours a different, nitrogen-tolerant community.
"""

SAMPLES = {"news": NEWS, "korean": KOREAN, "code": CODE, "maths": MATHS, "science": SCIENCE}
