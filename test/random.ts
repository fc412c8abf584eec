/** Chance from a seed, so that what a random test has found can be found again. */

/** mulberry32: quick, and good from any seed. */
export class Random {
  constructor(private state: number) {}

  /** A whole number from 0 to limit - 1. */
  below(limit: number): number {
    this.state = (this.state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(this.state ^ (this.state >>> 15), 1 | this.state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) % limit;
  }

  /** True once in so many times. */
  once = (times: number) => this.below(times) === 0;

  pick = <T>(list: readonly T[]) => list[this.below(list.length)] as T; // in range: no list is empty

  several = <T>(most: number, make: () => T) => Array.from({ length: this.below(most + 1) }, make);

  bytes(length: number): Buffer {
    const words = new Uint32Array(Math.ceil(length / 4));
    for (let i = 0; i < words.length; i++) words[i] = this.below(2 ** 32);
    return Buffer.from(words.buffer, 0, length);
  }
}
