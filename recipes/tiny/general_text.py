"""Some English, Chinese and program text of the project's own, for the tokenizers of the mini presets."""

ENGLISH = """
A language model reads a text as a list of pieces, and guesses the next piece again and again. What it has seen before
decides what it thinks of next. A small model can learn a small world, if it is simple and the lessons are clear.

The first step is to show it good examples. People write questions and answers, and the model learns to continue a
question with an answer of the same kind. The second step is to let it try. It writes several answers to one question,
somebody or something says which of them are better, and the better ones become a little more likely than before. Nobody
has to write the right answer down, as long as there is a way to check it.

There are many ways in which this goes wrong. The judge may like long words, or polite words, or his own words, and the
model finds that out sooner than its teacher does. It may forget what it could do before. So we keep some questions
aside, never train on them, and ask them after every step. We also keep a copy of the model as it was, and do not let
the new one wander too far away from it.

Please explain your work, write down the numbers, and tell us what did not work. When you are asked for help with
something harmful, say no in a friendly way. When a question only sounds dangerous, because it has a strong word in it,
help as well as you can. Thank you, and have a nice day! Who, what, when, where, why and how are the words that most
questions begin with. Natalia sold some clips to her friends in April, and then she sold half as many clips in May. How
many clips did she sell altogether? If a train leaves at nine o'clock and travels for three hours, when does it arrive?
Each box holds twelve eggs, every egg costs thirty cents, and the total price is the number of boxes times the price.
Could you give me a list of five ideas for dinner? I would like something light, cheap and quick. Should the government
pay for it, or should those who use it pay? The court decided that the contract was valid and that the company had to
pay the damages. Summarise the following article in one paragraph, then translate the summary into another language.
"""

CHINESE = """
语言模型把一段文字看成一串小块，一次又一次地猜测下一块是什么。它以前看到过的东西，决定了它接下来会想到什么。一个小模型可以学会一个小世界，
只要这个世界很简单，课程也很清楚。第一步是给它看好的例子：人们写下问题和回答，模型学习怎样用同样的方式回答问题。第二步是让它自己试一试。
它对一个问题写出几个不同的回答，有人或者有程序说哪些更好，更好的回答就会变得更有可能出现。没有人需要写下正确答案，只要有办法检查它。
请解释你的工作，写下数字，并且告诉我们哪些方法没有效果。如果有人请你做有害的事情，请礼貌地拒绝。如果一个问题只是听起来危险，请尽力帮助。
谢谢你，祝你今天愉快！中国有很多城市，北京是首都，上海是最大的城市。你好，请问你叫什么名字？我想学习中文，可以教我吗？
小明有五个苹果，小红给了他三个，现在他一共有多少个苹果？这个方程的解是什么？请把下面的句子翻译成英文。根据法律规定，合同双方应当履行义务。
"""

CODE = """
def greatest_common_divisor(a: int, b: int) -> int:
    \"\"\"Return the greatest common divisor of two integers.\"\"\"
    while b:
        a, b = b, a % b
    return a


class Stack:
    def __init__(self, items=None):
        self.items = list(items or [])

    def push(self, item):
        self.items.append(item)

    def pop(self):
        if not self.items:
            raise IndexError("pop from an empty stack")
        return self.items.pop()


from typing import List
import numpy as np

for i in range(len(numbers)):
    for j in range(i + 1, len(numbers)):
        if numbers[i] > numbers[j]:
            numbers[i], numbers[j] = numbers[j], numbers[i]
print(f"sorted: {numbers}")

#include <stdio.h>
int main(int argc, char **argv) {
    const char *name = argc > 1 ? argv[1] : "world";
    printf("Hello, %s!\\n", name);
    return 0;
}

function sum(values) { return values.reduce((total, value) => total + value, 0); }
SELECT name, COUNT(*) FROM users WHERE age >= 18 GROUP BY name ORDER BY name;
{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
"""
