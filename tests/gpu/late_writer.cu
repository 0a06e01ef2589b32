// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The dsv4-router authors
//
// The worst predecessor of a dependent launch: it lets its dependents start at once, and writes what they read last.
extern "C" __global__ void late_writer(char* to, const char* from, long long bytes, long long nanoseconds) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
  unsigned long long start, now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
  do {
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  } while (now - start < (unsigned long long)nanoseconds);
  for (long long i = threadIdx.x; i < bytes; i += blockDim.x) to[i] = from[i];
}
