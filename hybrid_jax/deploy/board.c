/* What a compiler without an operating system lacks. */

float rintf(float x)
{
    const float whole = x < 0.0f ? -0x1p23f : 0x1p23f;
    return __builtin_copysignf(x > -0x1p23f && x < 0x1p23f ? x + whole - whole : x, x);
}
